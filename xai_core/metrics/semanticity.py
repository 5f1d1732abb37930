"""Semanticity of importance maps: do they follow the object, are they sparse and reproducible?

As defined for importance in [0, 1] of image patches (Importance Architectures, section 4.1, appendices D and E);
any map becomes such importance by its means inside patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.explainer import Explainer
from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.localisation.regions import true_mask
from xai_core.metrics.measured import Measured
from xai_core.metrics.shapeless import constant, not_finite
from xai_core.metrics.truth import INSIDE, UNKNOWN
from xai_core.registry import metrics

Scale = Literal["maximum", "range", "none"]
#: From here on importance, or the object's share of a patch, counts as object (section 4.1).
THRESHOLD = 0.5
# Maps are float32: means that differ by less, relative to the largest, differ by a rounding.
_ROUNDING = 1e-6

IMPORTANCE = (
    "a_i: mean of the map in patch i of p x p pixels (at the right and bottom border, of what is left of them), "
    "negative means set to 0, divided by the largest (scale maximum, section 4.1); scale range: minimum to "
    "maximum onto [0, 1]; scale none: as it is"
)
NO_IMPORTANCE = (
    "null where the map is not finite, constant or the same in every patch, where no patch's mean is positive "
    "(scale maximum); with scale none only where the map leaves [0, 1]"
)
REFERENCE = "m_i: the object's share of the known pixels of patch i; patches without known pixels do not count"


@dataclass(frozen=True)
class ImportanceOptions:
    """How a map becomes importance: ``patch``, the side p of the patches in pixels (1: every pixel is one).

    ``scale``: ``maximum`` (negative means to 0, then divided by the largest), ``range`` (minimum to maximum onto
    [0, 1]) or ``none`` (the map is importance in [0, 1] already).
    """

    patch: int = 16
    scale: Scale = "maximum"

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise UsageError(f"patch: expected a number of pixels of at least 1, got {self.patch}")
        if self.scale not in get_args(Scale):
            raise UsageError(f"scale: expected one of {', '.join(get_args(Scale))}, got {self.scale!r}")


@dataclass(frozen=True)
class ReproducibilityOptions(ImportanceOptions):
    """As for importance, and ``runs``: how often the method explains, each time with a seed of its own."""

    runs: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs < 2:
            raise UsageError(f"runs: expected at least 2, got {self.runs}")


@metrics.register(
    "segmentation_difference",
    options=ImportanceOptions,
    paper="Importance Architectures eq. 1 (d)",
    family="semanticity",
    definition=f"mean over patches of |m_i - a_i|. {REFERENCE}. {IMPORTANCE}",
    higher_is_better=False,
    unit="importance",
    undefined=f"{NO_IMPORTANCE}; null where the mask shows no object",
    needs=("mask",),
    cost="0",
)
def segmentation_difference(evidence: Evidence, options: ImportanceOptions) -> Measured:
    """Segmentation difference d: how far importance is from the object's share of each patch."""
    importance, unimportant = _importance(evidence, options)
    share, known = _object_share(evidence, options)
    value = torch.where(known, (share - importance).abs(), 0.0).sum(dim=1) / known.sum(dim=1)
    return Measured(value, {**unimportant, "the mask is empty": _empty(evidence)})


@metrics.register(
    "macro_iou",
    options=ImportanceOptions,
    paper="Importance Architectures section 4.1 (IoU)",
    family="semanticity",
    definition="mean of the intersection over union of object patches (a_i >= 0.5 against m_i >= 0.5) and that of "
    f"the other patches. {REFERENCE}. {IMPORTANCE}",
    higher_is_better=True,
    unit="share of patches",
    undefined=f"{NO_IMPORTANCE}; null where the mask shows no object, or makes all patches object, or none",
    needs=("mask",),
    cost="0",
)
def macro_iou(evidence: Evidence, options: ImportanceOptions) -> Measured:
    """Macro IoU: overlap of important patches with the object's, averaged with that of the other patches."""
    importance, unimportant = _importance(evidence, options)
    share, known = _object_share(evidence, options)
    important, inside = importance >= THRESHOLD, share >= THRESHOLD
    overlaps = [
        (a & b & known).sum(dim=1).double() / ((a | b) & known).sum(dim=1)
        for a, b in ((important, inside), (~important, ~inside))
    ]
    reasons = {
        **unimportant,
        "the mask is empty": _empty(evidence),
        "no patch is mostly object": ~(inside & known).any(dim=1),
        "no patch is mostly background": ~(~inside & known).any(dim=1),
    }
    return Measured(torch.stack(overlaps).mean(dim=0), reasons)


@metrics.register(
    "sparsity",
    options=ImportanceOptions,
    paper="Importance Architectures eq. 2 (s, appendix D)",
    family="semanticity",
    definition=f"mean of a_i over patches. {IMPORTANCE}",
    higher_is_better=False,
    unit="importance",
    undefined=NO_IMPORTANCE,
    cost="0",
)
def sparsity(evidence: Evidence, options: ImportanceOptions) -> Measured:
    """Sparsity s: mean importance of the patches; the fewer matter, the lower."""
    importance, unimportant = _importance(evidence, options)
    return Measured(importance.mean(dim=1), unimportant)


@metrics.register(
    "reproducibility",
    options=ReproducibilityOptions,
    paper="Importance Architectures eq. 3 (r, appendix E)",
    family="semanticity",
    definition="mean over patches of the standard deviation of a_i (n - 1 in the denominator) over n runs of the "
    f"method: the stored map, and n - 1 with the seeds that follow its own. {IMPORTANCE}",
    higher_is_better=False,
    unit="importance",
    undefined=f"null where the method has no seed of its own; as to any of the runs: {NO_IMPORTANCE}",
    needs=("explainer",),
    cost="runs - 1 explanations",
)
def reproducibility(evidence: Evidence, options: ReproducibilityOptions) -> Measured:
    """Reproducibility r: how far importance varies with the method's seed."""
    first, reasons = importance_of(evidence.maps, options)
    others = _reseeded(evidence.method, options.runs)
    nowhere = torch.zeros(len(evidence), dtype=torch.bool, device=first.device)
    if not others:
        return Measured(first.new_full(nowhere.shape, torch.nan), {"the method has no seed of its own": ~nowhere})
    runs, silent = [first], nowhere
    for explainer in others:
        maps = explainer.maps(evidence.model, evidence.images, evidence.targets, evidence.parts)
        again, unimportant = importance_of(maps, options)
        runs.append(again)
        silent = torch.stack([silent, *unimportant.values()]).any(dim=0)
    value = torch.stack(runs).std(dim=0).mean(dim=1)
    return Measured(value, {**reasons, "another seed's map shows no importance": silent})


def importance_of(maps: Tensor, options: ImportanceOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Importance ``[B, N]`` (float64) of the patches of maps ``[B, H, W]``, and by reason where it is none."""
    flat = maps.flatten(1)
    reasons = not_finite(maps)
    means = patch_means(maps, options.patch)
    if options.scale == "none":
        reasons["the map is not in [0, 1]"] = (flat.amin(dim=1) < 0) | (flat.amax(dim=1) > 1)
        return means, reasons
    lowest, highest = means.amin(dim=1, keepdim=True), means.amax(dim=1, keepdim=True)
    differ = highest - lowest > _ROUNDING * means.abs().amax(dim=1, keepdim=True)
    reasons |= constant(maps)
    reasons["all patches are equally important"] = ~differ.squeeze(1)
    if options.scale == "range":
        return (means - lowest) / (highest - lowest), reasons
    reasons["no patch has a positive mean"] = ~(highest > 0).squeeze(1)
    return means.clamp(min=0) / highest, reasons


def patch_means(values: Tensor, patch: int) -> Tensor:
    """Means ``[B, N]`` (float64) of ``[B, H, W]`` inside patches, row by row; the last ones may be cut off.

    Raises:
        UsageError: patches larger than the image.
    """
    if patch > min(values.shape[1:]):
        raise UsageError(f"patch: expected at most the image's side, got {patch} at {tuple(values.shape[1:])}")
    return F.avg_pool2d(values.double().unsqueeze(1), patch, stride=patch, ceil_mode=True).flatten(1)


def _importance(evidence: Evidence, options: ImportanceOptions) -> tuple[Tensor, dict[str, Tensor]]:
    return evidence.once(("importance", options), lambda: importance_of(evidence.maps, options))


def _object_share(evidence: Evidence, options: ImportanceOptions) -> tuple[Tensor, Tensor]:
    """The object's share of each patch ``[B, N]``, and where any pixel of it is known."""
    mask = true_mask(evidence)
    known = patch_means(mask != UNKNOWN, options.patch)
    return patch_means(mask == INSIDE, options.patch) / known, known > 0


def _empty(evidence: Evidence) -> Tensor:
    return ~(true_mask(evidence) == INSIDE).flatten(1).any(dim=1)


def _reseeded(explainer: Explainer, runs: int) -> list[Explainer]:
    """The method with the seeds that follow its own; none where chance plays no part in it."""
    others = [explainer.reseeded(run) for run in range(1, runs)]
    return [one for one in others if one is not None]
