"""Where a map ought to lie: the object's mask, or the box around it, without the pixels that nobody knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.truth import INSIDE, OUTSIDE, UNKNOWN
from xai_core.parts.labels import NO_PART, part_boxes

RegionKind = Literal["mask", "box"]

#: What every definition says of the region, and what makes it unfit to measure by.
REGION = "R is the object's mask or the one box around it; unknown pixels (255) are neither in R nor outside"
NULL = "null where the map is not finite, the mask is empty, or R covers all that is known"


@dataclass(frozen=True)
class RegionOptions:
    """``region``: ``mask``, the object's own pixels, or ``box``, the one upright box around all of them."""

    region: RegionKind = "mask"

    def __post_init__(self) -> None:
        if self.region not in ("mask", "box"):
            raise UsageError(f"region: expected mask or box, got {self.region!r}")


@dataclass(frozen=True)
class Region:
    """Where maps ought to lie and where not, ``[B, H, W]`` bool; a pixel that is in neither is left out."""

    inside: Tensor
    outside: Tensor

    @property
    def known(self) -> Tensor:
        """The pixels that count, ``[B, H, W]``."""
        return self.inside | self.outside

    @property
    def undefined(self) -> dict[str, Tensor]:
        """Why nothing can be told by a region, as reasons with where they apply ``[B]``."""
        return {
            "the mask is empty": ~self.inside.flatten(1).any(dim=1),
            # Whatever a map looks like, all that is known of it would lie on the object.
            "the region covers all that is known": ~self.outside.flatten(1).any(dim=1),
        }


def target_region(evidence: Evidence, kind: RegionKind) -> Region:
    """The region of each image's target, from the mask of its object.

    Raises:
        UsageError: masks of another size than the images.
    """

    def found() -> Region:
        mask = true_mask(evidence)
        known = mask != UNKNOWN
        inside = mask == INSIDE if kind == "mask" else _in_box(mask) & known
        return Region(inside, known & ~inside)

    return evidence.once(("region", kind), found)


def true_mask(evidence: Evidence) -> Tensor:
    """The masks ``[B, H, W]`` of evidence that has some.

    Raises:
        UsageError: there are none, they have another size than the images, or hold values that mean nothing.
    """
    mask = evidence.truth.mask
    if mask is None:
        raise UsageError("metrics: expected masks of objects, got none: give Evidence a Truth with a mask")
    if mask.shape != evidence.maps.shape:
        raise UsageError(f"metrics: expected masks of shape {tuple(evidence.maps.shape)}, got {tuple(mask.shape)}")
    if not bool(((mask == INSIDE) | (mask == OUTSIDE) | (mask == UNKNOWN)).all()):
        raise UsageError(
            f"metrics: expected masks of {OUTSIDE} (elsewhere), {INSIDE} (object) and {UNKNOWN} (unknown), "
            f"got {sorted(mask.unique().tolist())[:10]}"
        )
    return mask


def _in_box(mask: Tensor) -> Tensor:
    """Where the box around each object is, ``[B, H, W]``; nowhere without an object."""
    height, width = mask.shape[1:]
    labels = torch.where(mask == INSIDE, 0, NO_PART)
    left, top, right, bottom = part_boxes(labels, 1)[:, 0].view(-1, 4, 1, 1).unbind(dim=1)
    row = torch.arange(height, device=mask.device).view(1, -1, 1)
    column = torch.arange(width, device=mask.device).view(1, 1, -1)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)
