"""Top-k intersection: how many of the strongest pixels are on the object?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.localisation.regions import (
    NULL,
    REGION,
    RegionOptions,
    target_region,
)
from xai_core.metrics.measured import Measured
from xai_core.metrics.shapeless import constant, not_finite
from xai_core.registry import metrics


@dataclass(frozen=True)
class TopKOptions(RegionOptions):
    """As for every region, and ``k``: how many pixels count as the strongest."""

    k: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UsageError(f"k: expected at least 1 pixel, got {self.k}")


@metrics.register(
    "top_k_intersection",
    options=TopKOptions,
    paper="Theiner et al. 2021, Interpretable Semantic Photo Geolocalization",
    family="localisation",
    needs=("mask",),
    definition="share of the k highest pixels of the signed map that lie in R; pixels that tie for the last "
    f"places share these evenly; {REGION}",
    higher_is_better=True,
    unit="share of k pixels",
    undefined=f"{NULL}; where the map is constant, or no more than k pixels are known",
    cost="0",
)
def top_k_intersection(evidence: Evidence, options: TopKOptions) -> Measured:
    """Top-k intersection: the share of a map's strongest pixels that is on the object."""
    region = target_region(evidence, options.region)
    known, inside = region.known.flatten(1), region.inside.flatten(1)
    values = evidence.maps.flatten(1).masked_fill(~known, -torch.inf)
    last = values.topk(min(options.k, values.shape[1]), dim=1).values[:, -1:]
    above, tied = values > last, (values == last) & known
    places = options.k - above.sum(dim=1)
    shared = places * (tied & inside).sum(dim=1).double() / tied.sum(dim=1)
    reasons = {
        **not_finite(evidence.maps),
        **region.undefined,
        **constant(evidence.maps, known=region.known),
        "no more than k pixels are known": known.sum(dim=1) <= options.k,
    }
    return Measured(((above & inside).sum(dim=1) + shared) / options.k, reasons)
