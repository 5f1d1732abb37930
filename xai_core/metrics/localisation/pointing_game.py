"""Pointing game: is the strongest pixel on the object?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
from xai_core.metrics.shapeless import constant, not_finite
from xai_core.registry import metrics


@dataclass(frozen=True)
class PointingGameOptions(RegionOptions):
    """As for every region, and ``tolerance``: how many pixels beside the region still count as a hit."""

    tolerance: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < math.inf:
            raise UsageError(f"tolerance: expected a number of pixels >= 0, got {self.tolerance}")


@metrics.register(
    "pointing_game",
    options=PointingGameOptions,
    paper="Zhang et al. 2016, Excitation Backprop; iERF eq. 31",
    family="localisation",
    needs=("mask",),
    definition="1 where the highest pixel of the signed map lies within the tolerance of R (Euclidean, in pixels "
    f"of the model's input), else 0; of several equally high pixels, the share that does; {REGION}, unless they "
    "lie within the tolerance",
    higher_is_better=True,
    unit="hits",
    undefined=f"{NULL} with its tolerance, or where the map is constant",
    cost="0",
)
def pointing_game(evidence: Evidence, options: PointingGameOptions) -> Measured:
    """Pointing game: whether the map's maximum is on the object, give or take some pixels."""
    region = evidence.once(
        ("widened region", options.region, options.tolerance),
        lambda: widened(target_region(evidence, options.region), options.tolerance),
    )
    maps, known = evidence.maps, region.known
    candidates = maps.masked_fill(~known, -torch.inf)
    highest = known & (candidates == candidates.amax(dim=(1, 2), keepdim=True))
    hits = (highest & region.inside).sum(dim=(1, 2)).double() / highest.sum(dim=(1, 2))
    return Measured(hits, {**not_finite(maps), **region.undefined, **constant(maps, known=known)})


def widened(region: Region, tolerance: float) -> Region:
    """A region with all that lies within ``tolerance`` pixels of it, known or not."""
    inside = dilated(region.inside, tolerance)
    return Region(inside, region.outside & ~inside)


def dilated(mask: Tensor, radius: float) -> Tensor:
    """Pixels whose centre is at most ``radius`` from that of one in the mask, ``[B, H, W]`` bool both."""
    height, width = mask.shape[1:]
    # No two pixels are further apart.
    radius = min(radius, float(height + width))
    sideways = _row_distance(mask, far=int(radius) + width)
    found = torch.zeros_like(mask)
    # One pass a row of the half disc: as many as the radius asks for, whatever the number of images.
    for offset in range(min(int(radius), height - 1) + 1):
        near = sideways <= math.floor(math.sqrt(radius * radius - offset * offset))
        found[:, offset:] |= near[:, : height - offset]
        found[:, : height - offset] |= near[:, offset:]
    return found


def _row_distance(mask: Tensor, far: int) -> Tensor:
    """Distance of each pixel to the nearest one in the mask on its own row, ``[B, H, W]``; over ``far``: none."""
    column = torch.arange(mask.shape[2], dtype=torch.int32, device=mask.device)
    before = torch.where(mask, column, -far - 1).cummax(dim=2).values
    after = torch.where(mask, column, 2 * far + 1).flip(2).cummin(dim=2).values.flip(2)
    return torch.minimum(column - before, after - column)
