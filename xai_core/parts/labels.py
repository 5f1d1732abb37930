"""Part labels of a batch: one byte a pixel, part ids without gaps, and what is counted from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xai_core.errors import UsageError

NO_PART = 255
# One value of a byte stands for "no part"; one more is left free, so that a count fits a byte as well.
MOST_PARTS = 254


def compact(labels: np.ndarray) -> np.ndarray:
    """Renames the parts of one image 0, 1, ... in the order in which a reader meets them.

    Row by row from the top left. Order of size would be as compact, but two parts of nearly the same size
    would swap names at the slightest change of the image.

    Args:
        labels: integers ``[H, W]``, ``NO_PART`` where there is none.

    Returns:
        uint8 ``[H, W]``.

    Raises:
        UsageError: more than ``MOST_PARTS`` parts.
    """
    values, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    parts = values != NO_PART
    if parts.sum() > MOST_PARTS:
        raise UsageError(
            f"parts: expected at most {MOST_PARTS} parts in an image, got {parts.sum()}; "
            "ask for fewer, or name in 'ignore' the mask values that are no part"
        )
    names = np.full(len(values), NO_PART, dtype=np.uint8)
    reading_order = np.argsort(np.where(parts, first, labels.size))
    names[reading_order[: parts.sum()]] = np.arange(parts.sum())
    return names[inverse].reshape(labels.shape)


def part_counts(labels: Tensor) -> Tensor:
    """Number of parts of each image, ``[B]`` int64: 0 where a mask names no part at all."""
    without = torch.where(labels == NO_PART, -1, labels.long())
    return without.flatten(1).amax(dim=1) + 1


def parts_present(labels: Tensor) -> Tensor:
    """Which labels occur in which image: ``[B, K]`` bool, K the largest number of parts.

    Args:
        labels: ``[B, H, W]``, ``NO_PART`` where there is none.
    """
    flat = labels.flatten(1).long()
    seen = torch.zeros(len(flat), NO_PART + 1, dtype=torch.bool, device=labels.device)
    seen.scatter_(1, flat, True)
    seen = seen[:, :NO_PART]
    occurring = seen.any(dim=0).nonzero()
    return seen[:, : int(occurring.max()) + 1 if len(occurring) else 0]


def part_areas(labels: Tensor, count: int) -> Tensor:
    """Pixels of the parts 0 .. ``count`` - 1 of each image: ``[B, K]`` int64, 0 where there is no such part.

    Args:
        labels: uint8 ``[B, H, W]`` as ``parse_parts`` gives them.
        count: K, columns of the answer.
    """
    flat = labels.flatten(1).long()
    areas = torch.zeros(len(flat), NO_PART + 1, dtype=torch.int64, device=labels.device)
    return areas.scatter_add_(1, flat, torch.ones_like(flat))[:, :count]


def mean_inside_parts(maps: Tensor, parts: Tensor) -> Tensor:
    """Part scores of a pixel map: its mean inside each part (KL-Hessian eq. 14).

    Args:
        maps: ``[B, H, W]``; parts: labels ``[B, H, W]``, 255 where there is no part.

    Returns:
        ``[B, K]`` float64, NaN where an image has no such part.
    """
    labels = parts.flatten(1).long()
    table = torch.zeros(len(maps), 256, dtype=torch.float64, device=maps.device)
    total = table.scatter_add(1, labels, maps.flatten(1).double())
    area = table.scatter_add(1, labels, torch.ones_like(labels, dtype=torch.float64))
    present = (area[:, :255] > 0).any(dim=0).nonzero()
    count = int(present.max()) + 1 if len(present) else 0
    return total[:, :count] / torch.where(area[:, :count] > 0, area[:, :count], torch.nan)


def part_boxes(labels: Tensor, count: int) -> Tensor:
    """Boxes around the parts 0 .. ``count`` - 1 of each image, in pixels with exclusive ends.

    Args:
        labels: uint8 ``[B, H, W]`` as ``parse_parts`` gives them.
        count: K, columns of the answer.

    Returns:
        ``[B, K, 4]`` int64 as x0, y0, x1, y1; zeros where there is no such part.
    """
    batch, height, width = labels.shape
    flat = labels.long()
    image = torch.arange(batch, device=labels.device).view(-1, 1, 1)
    row = torch.arange(height, device=labels.device).view(1, -1, 1)
    column = torch.arange(width, device=labels.device).view(1, 1, -1)
    in_row = torch.zeros(batch, NO_PART + 1, height, dtype=torch.bool, device=labels.device)
    in_column = torch.zeros(batch, NO_PART + 1, width, dtype=torch.bool, device=labels.device)
    in_row[image, flat, row] = True
    in_column[image, flat, column] = True
    top, bottom = _extent(in_row[:, :count])
    left, right = _extent(in_column[:, :count])
    return torch.stack([left, top, right, bottom], dim=-1)


def _extent(present: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True along the last dimension; 0, 0 where there is none."""
    line = present.to(torch.uint8)
    first = line.argmax(dim=-1)
    end = line.shape[-1] - line.flip(-1).argmax(dim=-1)
    return first, end * present.any(dim=-1)
