"""How much of a map lies on the object: shares of relevance, overlap of regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.localisation.regions import (
    NULL,
    REGION,
    Region,
    RegionOptions,
    target_region,
)
from xai_core.metrics.measured import Measured
from xai_core.metrics.shapeless import not_finite
from xai_core.registry import metrics, refuse_unread

NULL_POSITIVE = f"{NULL}, or where no known pixel has positive relevance"


@dataclass(frozen=True)
class BlurOptions(RegionOptions):
    """As for every region; ``kernel`` and ``sigma``: side and width in pixels of the Gaussian, 1 for none."""

    kernel: int = 11
    sigma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel: expected an odd number of pixels, got {self.kernel}")
        if not self.sigma > 0:
            raise UsageError(f"sigma: expected a number of pixels > 0, got {self.sigma}")
        if self.kernel == 1:
            refuse_unread(self, "with a kernel of one pixel", "sigma")


@dataclass(frozen=True)
class OverlapOptions(BlurOptions):
    """As for region attribution; ``threshold``: the share of the map's maximum that a marked pixel exceeds."""

    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise UsageError(f"threshold: expected a number from 0 to below 1, got {self.threshold}")


@dataclass(frozen=True)
class Marked:
    """Pixels of each image, ``[B]`` float64: those that a map marks, those of the region, and those of both."""

    both: Tensor
    marked: Tensor
    region: Tensor


def positive_part(maps: Tensor) -> Tensor:
    """max(map, 0) in float64; NaN stays."""
    return maps.double().clamp(min=0)


def blurred(relevance: Tensor, kernel: int, sigma: float) -> Tensor:
    """Gaussian blur of ``[B, H, W]``, borders reflected; exactly 0 where the kernel meets nothing but 0."""
    for axis in (1, 2):
        size = relevance.shape[axis]
        # A border cannot be reflected further than to the other one.
        radius = min(kernel // 2, size - 1)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
        border = (0, 0, radius, radius) if axis == 1 else (radius, radius, 0, 0)
        padded = F.pad(relevance.unsqueeze(1), border, mode="reflect").squeeze(1)
        # Added tap by tap, since a convolution by transforms would leave traces where nothing was.
        taps = enumerate((weights / weights.sum()).tolist())
        relevance = sum((weight * padded.narrow(axis, at, size) for at, weight in taps), relevance.new_zeros(()))
    return relevance


def share_inside(relevance: Tensor, region: Region) -> Tensor:
    """The region's share of all known relevance ``[B, H, W]``: ``[B]``; NaN where there is none."""
    within = (relevance * region.inside).sum(dim=(1, 2))
    return within / (relevance * region.known).sum(dim=(1, 2))


def mark(relevance: Tensor, region: Region, threshold: float) -> Marked:
    """The known pixels above ``threshold`` times the highest of them, counted inside the region and in all."""
    known = relevance * region.known
    marked = known > threshold * known.amax(dim=(1, 2), keepdim=True)
    counts = ((marked & region.inside), marked, region.inside)
    return Marked(*(one.sum(dim=(1, 2)).double() for one in counts))


#: Overlap of what a map marks with its region (VAR, appendix B.1.2 - B.1.4).
OVERLAPS: dict[str, Callable[[Marked], Tensor]] = {
    "iou": lambda counts: counts.both / (counts.marked + counts.region - counts.both),
    "precision": lambda counts: counts.both / counts.marked,
    "recall": lambda counts: counts.both / counts.region,
    # The harmonic mean of precision and recall, and 0 where both are.
    "f1": lambda counts: 2 * counts.both / (counts.marked + counts.region),
}


def no_relevance(relevance: Tensor, region: Region) -> dict[str, Tensor]:
    """Where there is nothing to share out, as a reason."""
    return {"the map has no positive relevance": ~((relevance > 0) & region.known).flatten(1).any(dim=1)}


def _undefined(evidence: Evidence, relevance: Tensor, region: Region) -> dict[str, Tensor]:
    return {**not_finite(evidence.maps), **region.undefined, **no_relevance(relevance, region)}


@metrics.register(
    "attribution_localisation",
    options=RegionOptions,
    paper="Kohlbrenner et al. 2020, inside-total relevance ratio; iERF eq. 32",
    family="localisation",
    needs=("mask",),
    definition=f"sum of max(map, 0) in R / sum of max(map, 0) over all known pixels; {REGION}",
    higher_is_better=True,
    unit="share of relevance",
    undefined=NULL_POSITIVE,
    cost="0",
)
def attribution_localisation(evidence: Evidence, options: RegionOptions) -> Measured:
    """Attribution localisation: the share of positive relevance that lies on the object."""
    region = target_region(evidence, options.region)
    relevance = positive_part(evidence.maps)
    return Measured(share_inside(relevance, region), _undefined(evidence, relevance, region))


def _blurred_positive_part(evidence: Evidence, options: BlurOptions) -> Tensor:
    return evidence.once(
        ("blurred positive part", options.kernel, options.sigma),
        lambda: blurred(positive_part(evidence.maps), options.kernel, options.sigma),
    )


@metrics.register(
    "region_attribution",
    options=BlurOptions,
    paper="VAR B.1.1",
    family="localisation",
    needs=("mask",),
    definition="sum of G * max(map, 0) in R / its sum over all known pixels, G a normalised 11 x 11 Gaussian of "
    f"sigma 2, borders reflected; {REGION}",
    higher_is_better=True,
    unit="share of relevance",
    undefined=NULL_POSITIVE,
    cost="0",
)
def region_attribution(evidence: Evidence, options: BlurOptions) -> Measured:
    """Region attribution (RA): the share of blurred positive relevance that lies on the object."""
    region = target_region(evidence, options.region)
    relevance = _blurred_positive_part(evidence, options)
    return Measured(share_inside(relevance, region), _undefined(evidence, relevance, region))


def _overlap(evidence: Evidence, options: OverlapOptions, name: str) -> Measured:
    """One of the overlaps; the marked pixels are counted once for all of them."""
    region = target_region(evidence, options.region)
    relevance = _blurred_positive_part(evidence, options)
    counts = evidence.once(("marked", options), lambda: mark(relevance, region, options.threshold))
    return Measured(OVERLAPS[name](counts), _undefined(evidence, relevance, region))


def _overlap_facts(section: str, formula: str, unit: str) -> dict[str, Any]:
    """What the registry is told of an overlap."""
    return {
        "options": OverlapOptions,
        "paper": f"VAR {section}",
        "family": "localisation",
        "needs": ("mask",),
        "definition": f"{formula}, where A is the set of known pixels with G * max(map, 0) above the threshold "
        "times its maximum over them (threshold 0: all that the blurred positive part reaches), G a normalised "
        f"11 x 11 Gaussian of sigma 2, borders reflected; {REGION}",
        "higher_is_better": True,
        "unit": unit,
        "undefined": NULL_POSITIVE,
        "cost": "0",
    }


@metrics.register("iou", **_overlap_facts("B.1.2", "|A and R| / |A or R|", "share of pixels"))
def iou(evidence: Evidence, options: OverlapOptions) -> Measured:
    """IoU: overlap of the marked pixels with the object, over all pixels of either."""
    return _overlap(evidence, options, "iou")


@metrics.register("precision", **_overlap_facts("B.1.3", "|A and R| / |A|", "share of marked pixels"))
def precision(evidence: Evidence, options: OverlapOptions) -> Measured:
    """Precision: the share of the marked pixels that lies on the object."""
    return _overlap(evidence, options, "precision")


@metrics.register("recall", **_overlap_facts("B.1.3", "|A and R| / |R|", "share of the region"))
def recall(evidence: Evidence, options: OverlapOptions) -> Measured:
    """Recall: the share of the object that is marked."""
    return _overlap(evidence, options, "recall")


@metrics.register("f1", **_overlap_facts("B.1.4", "2 |A and R| / (|A| + |R|)", "F1 score"))
def f1(evidence: Evidence, options: OverlapOptions) -> Measured:
    """F1: the harmonic mean of precision and recall of the marked pixels."""
    return _overlap(evidence, options, "f1")
