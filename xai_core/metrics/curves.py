"""Metrics read off perturbation curves: insertion, deletion, AOPC and their part-level counterparts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.baselines import Baseline, BaselineKind
from xai_core.metrics.trajectory import Curve, Trajectory
from xai_core.registry import metrics

Curves = dict[Trajectory, Curve]

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

    @property
    def named_baseline(self) -> Baseline:
        """The baseline as the engine takes it; fields that the kind does not read keep their defaults."""
        sigma = self.sigma if self.baseline == "blur" else Baseline.sigma
        seed = self.seed if self.baseline == "noise" else Baseline.seed
        return Baseline(self.baseline, sigma, seed)


@dataclass(frozen=True)
class CurveOptions(PartCurveOptions):
    """As for parts, and ``steps`` T: into how many equal portions the pixels are cut."""

    steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"steps: expected at least 1, got {self.steps}")


def pixel_insertion(options: CurveOptions) -> tuple[Trajectory, ...]:
    """Reveal pixels of the image over the baseline, most relevant first."""
    return (Trajectory("baseline", "pixels", options.named_baseline, options.steps),)


def pixel_deletion(options: CurveOptions) -> tuple[Trajectory, ...]:
    """Replace pixels of the image by the baseline, most relevant first."""
    return (Trajectory("image", "pixels", options.named_baseline, options.steps),)


def part_insertion(options: PartCurveOptions) -> tuple[Trajectory, ...]:
    """Reveal whole parts over the baseline, highest score first."""
    return (Trajectory("baseline", "parts", options.named_baseline),)


def part_deletion(options: PartCurveOptions) -> tuple[Trajectory, ...]:
    """Replace whole parts by the baseline, highest score first."""
    return (Trajectory("image", "parts", options.named_baseline),)


def area(curve: Curve) -> Tensor:
    """Normalised trapezoid area under curves ``[B, T + 1]``, steps 0 and T kept: ``[B]``; NaN if any step is."""
    width = curve.fraction.diff(dim=1)
    height = 0.5 * (curve.prob[:, 1:] + curve.prob[:, :-1])
    return torch.where(width.isnan(), 0.0, width * height).sum(dim=1)


def mean_drop(curve: Curve, *, absolute: bool) -> Tensor:
    """Mean over steps 1..T of p(x) - p(x_t), or of its absolute value: ``[B]``; NaN if any step is."""
    drop = curve.prob[:, :1] - curve.prob[:, 1:]
    taken = curve.fraction[:, 1:].isfinite()
    return torch.where(taken, drop.abs() if absolute else drop, 0.0).sum(dim=1) / taken.sum(dim=1)


@metrics.register(
    "insertion",
    options=CurveOptions,
    paper="Petsiuk et al. 2018, RISE; KL-Hessian 5.1.1",
    definition="area under p(target) while pixels are revealed over the baseline, most relevant first, in T "
    "equal steps; x is the fraction of pixels; trapezoid with both ends",
    higher_is_better=True,
    undefined=NULL_PIXELS,
    trajectories=pixel_insertion,
)
def insertion(curves: Curves, options: CurveOptions) -> Tensor:
    """Insertion: area under the curve of revealed pixels."""
    return area(curves[pixel_insertion(options)[0]])


@metrics.register(
    "deletion",
    options=CurveOptions,
    paper="Petsiuk et al. 2018, RISE; KL-Hessian 5.1.1",
    definition="area under p(target) while pixels are replaced by the baseline, most relevant first, in T "
    "equal steps; x is the fraction of pixels; trapezoid with both ends",
    higher_is_better=False,
    undefined=NULL_PIXELS,
    trajectories=pixel_deletion,
)
def deletion(curves: Curves, options: CurveOptions) -> Tensor:
    """Deletion: area under the curve of replaced pixels."""
    return area(curves[pixel_deletion(options)[0]])


@metrics.register(
    "aopc",
    options=CurveOptions,
    paper="Samek et al. 2017, eq. 12; KL-Hessian 5.1.1",
    definition="mean over steps 1..T of p(x) - p(x_t) on the deletion trajectory",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    undefined=NULL_PIXELS,
    trajectories=pixel_deletion,
)
def aopc(curves: Curves, options: CurveOptions) -> Tensor:
    """AOPC: mean drop of the target's probability along deletion."""
    return mean_drop(curves[pixel_deletion(options)[0]], absolute=False)


@metrics.register(
    "p_insertion",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 12",
    definition="as insertion, whole parts in K steps by their score; a pixel map scores a part by its mean "
    "inside it (eq. 14); pixels outside all parts go with the last",
    higher_is_better=True,
    undefined=NULL_PARTS,
    trajectories=part_insertion,
)
def p_insertion(curves: Curves, options: PartCurveOptions) -> Tensor:
    """P-Ins: area under the curve of revealed parts."""
    return area(curves[part_insertion(options)[0]])


@metrics.register(
    "p_deletion",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 12",
    definition="as deletion, whole parts in K steps by their score; a pixel map scores a part by its mean "
    "inside it (eq. 14); pixels outside all parts go with the last",
    higher_is_better=False,
    undefined=NULL_PARTS,
    trajectories=part_deletion,
)
def p_deletion(curves: Curves, options: PartCurveOptions) -> Tensor:
    """P-Del: area under the curve of replaced parts."""
    return area(curves[part_deletion(options)[0]])


@metrics.register(
    "p_aopc",
    options=PartCurveOptions,
    paper="KL-Hessian eq. 13",
    definition="mean over steps 1..K of |p(x) - p(x_k)| on the part deletion trajectory",
    higher_is_better=True,
    undefined=NULL_PARTS,
    trajectories=part_deletion,
)
def p_aopc(curves: Curves, options: PartCurveOptions) -> Tensor:
    """P-AOPC: mean absolute change of the target's probability along part deletion."""
    return mean_drop(curves[part_deletion(options)[0]], absolute=True)


def defined(trajectory: Trajectory, maps: Tensor, scores: Tensor) -> Tensor:
    """Where a trajectory's ranking means something, ``[B]``: from maps ``[B, H, W]`` and scores ``[B, K]``."""
    values = maps.flatten(1) if trajectory.unit == "pixels" else scores
    finite = torch.isfinite(maps.flatten(1)).all(dim=1)
    if not values.shape[1]:
        return torch.zeros_like(finite)
    highest = values.nan_to_num(-torch.inf).amax(dim=1)
    lowest = values.nan_to_num(torch.inf).amin(dim=1)
    return finite & (highest > lowest)
