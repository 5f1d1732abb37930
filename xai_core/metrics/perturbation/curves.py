"""Metrics read off perturbation curves: insertion, deletion, AOPC and their part-level counterparts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from xai_core.baselines import Baseline, BaselineKind
from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.trajectory import Curve, Trajectory
from xai_core.registry import metrics, refuse_unread

NULL_PIXELS = "null where the map is constant or not finite: it ranks nothing"
NULL_PARTS = "null where fewer than two parts exist or all parts score the same: nothing is ranked"


@dataclass(frozen=True)
class PartCurveOptions:
    """``baseline`` is what replaces a removed part; ``sigma`` and ``seed`` belong to blur and noise."""

    baseline: BaselineKind = "blur"
    sigma: float = 11.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UsageError(f"sigma: expected a number of pixels > 0, got {self.sigma}")
        read_by = {"sigma": "blur", "seed": "noise"}
        unread = [name for name, kind in read_by.items() if kind != self.baseline]
        refuse_unread(self, f"with baseline {self.baseline!r}", *unread)

    @property
    def named_baseline(self) -> Baseline:
        """The baseline as the engine takes it."""
        return Baseline(self.baseline, self.sigma, self.seed)


@dataclass(frozen=True)
class CurveOptions(PartCurveOptions):
    """As for parts, and ``steps`` T: into how many equal portions the pixels are cut."""

    steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"steps: expected at least 1, got {self.steps}")


def pixel_insertion(options: CurveOptions) -> Trajectory:
    """Reveal pixels of the image over the baseline, most relevant first."""
    return Trajectory("baseline", "pixels", options.named_baseline, options.steps)


def pixel_deletion(options: CurveOptions) -> Trajectory:
    """Replace pixels of the image by the baseline, most relevant first."""
    return Trajectory("image", "pixels", options.named_baseline, options.steps)


def part_insertion(options: PartCurveOptions) -> Trajectory:
    """Reveal whole parts over the baseline, highest score first."""
    return Trajectory("baseline", "parts", options.named_baseline)


def part_deletion(options: PartCurveOptions) -> Trajectory:
    """Replace whole parts by the baseline, highest score first."""
    return Trajectory("image", "parts", options.named_baseline)


def _measured(evidence: Evidence, trajectory: Trajectory, read: Callable[[Curve], Tensor]) -> Measured:
    """What is read off a trajectory's curve, undefined where its ranking means nothing."""
    return Measured(read(evidence.curve(trajectory)), evidence.unranked(trajectory.unit))


def area(curve: Curve) -> Tensor:
    """Normalised trapezoid area under curves ``[B, T + 1]``, steps 0 and T kept: ``[B]``; NaN if any step is."""
    width = curve.fraction.diff(dim=1)
    height = 0.5 * (curve.prob[:, 1:] + curve.prob[:, :-1])
    return torch.where(width.isnan(), 0.0, width * height).sum(dim=1)


def least_first(insertion: Curve) -> Curve:
    """Deletion, least relevant pixels first: insertion read backwards, for the pictures are the same.

    After ``insertion`` has revealed n pixels, all but these are replaced, and these are the least relevant ones.
    """
    return Curve(1.0 - insertion.fraction.flip(1), insertion.prob.flip(1))


def mean_drop(curve: Curve, *, absolute: bool) -> Tensor:
    """Mean over steps 1..T of p(x) - p(x_t), or of its absolute value: ``[B]``; NaN if any step is."""
    drop = curve.prob[:, :1] - curve.prob[:, 1:]
    taken = curve.fraction[:, 1:].isfinite()
    return torch.where(taken, drop.abs() if absolute else drop, 0.0).sum(dim=1) / taken.sum(dim=1)


@metrics.register(
    "insertion",
    options=CurveOptions,
    paper="Petsiuk et al. 2018, RISE; KL-Hessian 5.1.1",
    family="perturbation",
    definition="area under p(target) while pixels are revealed over the baseline, most relevant first, in T "
    "equal steps; x is the fraction of pixels; trapezoid with both ends",
    higher_is_better=True,
    unit="probability",
    undefined=NULL_PIXELS,
    cost="T",
)
def insertion(evidence: Evidence, options: CurveOptions) -> Measured:
    """Insertion: area under the curve of revealed pixels."""
    return _measured(evidence, pixel_insertion(options), area)


@metrics.register(
    "deletion",
    options=CurveOptions,
    paper="Petsiuk et al. 2018, RISE; KL-Hessian 5.1.1",
    family="perturbation",
    definition="area under p(target) while pixels are replaced by the baseline, most relevant first, in T "
    "equal steps; x is the fraction of pixels; trapezoid with both ends",
    higher_is_better=False,
    unit="probability",
    undefined=NULL_PIXELS,
    cost="T",
)
def deletion(evidence: Evidence, options: CurveOptions) -> Measured:
    """Deletion: area under the curve of replaced pixels."""
    return _measured(evidence, pixel_deletion(options), area)


@metrics.register(
    "aopc",
    options=CurveOptions,
    paper="Samek et al. 2017, eq. 12; KL-Hessian 5.1.1",
    family="perturbation",
    definition="mean over steps 1..T of p(x) - p(x_t) on the deletion trajectory",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="probability",
    undefined=NULL_PIXELS,
    cost="T",
)
def aopc(evidence: Evidence, options: CurveOptions) -> Measured:
    """AOPC: mean drop of the target's probability along deletion."""
    return _measured(evidence, pixel_deletion(options), partial(mean_drop, absolute=False))


@metrics.register(
    "srg",
    options=CurveOptions,
    paper="Bluecher et al. 2024, symmetric relevance gain",
    family="perturbation",
    definition="area under p(target) while pixels are replaced by the baseline, least relevant first, minus the "
    "same, most relevant first (deletion); least relevant first is insertion read backwards, of the same area",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="probability",
    undefined=NULL_PIXELS,
    cost="2 T",
)
def srg(evidence: Evidence, options: CurveOptions) -> Measured:
    """SRG: how much longer the target holds out when the least relevant pixels go first."""
    least = _measured(evidence, pixel_insertion(options), lambda curve: area(least_first(curve)))
    most = _measured(evidence, pixel_deletion(options), area)
    return Measured(least.value - most.value, most.undefined)


@metrics.register(
    "p_insertion",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 12",
    family="perturbation",
    needs=("parts",),
    definition="as insertion, whole parts in K steps by their score; a pixel map scores a part by its mean "
    "inside it (eq. 14); pixels outside all parts go with the last",
    higher_is_better=True,
    unit="probability",
    undefined=NULL_PARTS,
    cost="K",
)
def p_insertion(evidence: Evidence, options: PartCurveOptions) -> Measured:
    """P-Ins: area under the curve of revealed parts."""
    return _measured(evidence, part_insertion(options), area)


@metrics.register(
    "p_deletion",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 12",
    family="perturbation",
    needs=("parts",),
    definition="as deletion, whole parts in K steps by their score; a pixel map scores a part by its mean "
    "inside it (eq. 14); pixels outside all parts go with the last",
    higher_is_better=False,
    unit="probability",
    undefined=NULL_PARTS,
    cost="K",
)
def p_deletion(evidence: Evidence, options: PartCurveOptions) -> Measured:
    """P-Del: area under the curve of replaced parts."""
    return _measured(evidence, part_deletion(options), area)


@metrics.register(
    "p_aopc",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 13",
    family="perturbation",
    needs=("parts",),
    definition="mean over steps 1..K of |p(x) - p(x_k)| on the part deletion trajectory",
    higher_is_better=True,
    unit="probability",
    undefined=NULL_PARTS,
    cost="K",
)
def p_aopc(evidence: Evidence, options: PartCurveOptions) -> Measured:
    """P-AOPC: mean absolute change of the target's probability along part deletion."""
    return _measured(evidence, part_deletion(options), partial(mean_drop, absolute=True))
