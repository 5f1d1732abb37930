"""Mosaics of images of distinct classes: who stands beside whom, and whatever belongs to images put together."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.parts.labels import NO_PART


@dataclass(frozen=True)
class Mosaics:
    """``M`` mosaics of ``side`` x ``side`` cells in the size of one image.

    ``members`` ``[M, side * side]``: which image stands in each cell, row by row; no image stands in two.
    ``size``: height and width in pixels. Where a side does not divide by the cells, the later ones are larger.
    """

    members: Tensor
    side: int
    size: tuple[int, int]

    def assemble(self, piece: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
        """What belongs to the images, as mosaics ``[M, ..., H, W]``.

        Args:
            piece: what belongs to some images, given their positions ``[M]``, at a height and width.
        """
        heights, widths = (self._cell_lengths(length) for length in self.size)
        rows = [
            torch.cat(
                [piece(self.members[:, row * self.side + column], (height, width)) for column, width in widths],
                dim=-1,
            )
            for row, height in heights
        ]
        return torch.cat(rows, dim=-2)

    @property
    def cells(self) -> Tensor:
        """The number of the cell that each pixel is in, ``[H, W]``."""
        row, column = (
            torch.tensor([cell for cell, count in self._cell_lengths(length) for _ in range(count)])
            for length in self.size
        )
        return (row.view(-1, 1) * self.side + column).to(self.members.device)

    def per_image(self, values: Tensor, count: int, missing: float | bool) -> Tensor:
        """Values of the cells ``[M, side * side]`` as values of ``count`` images; ``missing``: in no mosaic."""
        found = torch.full((count,), missing, dtype=values.dtype, device=values.device)
        return found.scatter(0, self.members.flatten(), values.flatten())

    def _cell_lengths(self, length: int) -> list[tuple[int, int]]:
        edges = [length * cell // self.side for cell in range(self.side + 1)]
        return [(cell, edges[cell + 1] - edges[cell]) for cell in range(self.side)]


def arrange(eligible: Tensor, classes: Tensor, size: tuple[int, int], side: int, seed: int) -> Mosaics:
    """Mosaics of the eligible images, each in at most one, with distinct classes in every mosaic.

    As many mosaics as there can be. Images are shuffled by the seed, within groups too, so that no cell is
    anyone's by position.

    Args:
        eligible: ``[B]`` bool; classes: ``[B]``; size: height and width of a mosaic.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(classes), generator=generator)
    chosen = shuffled[eligible.cpu()[shuffled]]
    groups = group(classes.cpu()[chosen].tolist(), side * side)
    rows = [chosen[torch.tensor(one)[torch.randperm(side * side, generator=generator)]] for one in groups]
    members = torch.stack(rows) if rows else torch.zeros(0, side * side, dtype=torch.long)
    return Mosaics(members.to(classes.device), side, size)


def group(classes: Sequence[int], count: int) -> list[list[int]]:
    """Groups of ``count`` positions whose classes are distinct, each position in at most one.

    Always from the classes with the most left: no other way forms more groups.
    """
    waiting: dict[int, deque[int]] = {}
    for position, one in enumerate(classes):
        waiting.setdefault(one, deque()).append(position)
    groups = []
    while len(waiting) >= count:
        fullest = heapq.nlargest(count, waiting, key=lambda one: len(waiting[one]))
        groups.append([waiting[one].popleft() for one in fullest])
        waiting = {one: left for one, left in waiting.items() if left}
    return groups


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``[M, 3, H, W]`` at a smaller size: bilinear with antialiasing."""
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def shrink_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels or masks ``[M, H, W]`` at a smaller size: the nearest pixel's."""
    return F.interpolate(labels.unsqueeze(1).float(), size=size, mode="nearest-exact").squeeze(1).long()


def join_labels(labels: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Part labels of mosaics in which every cell has parts of its own, numbered without gaps cell by cell.

    Args:
        labels: ``[M, H, W]`` as each cell's own image numbers them, 255 where there is no part; cells: ``[H, W]``.

    Returns:
        ``[M, H, W]`` int64, 255 where there is no part, and how many parts each mosaic has, ``[M]``: where these
        are more than a byte can name, the labels mean nothing.
    """
    own = (cells * (NO_PART + 1) + labels).flatten(1)
    present = torch.zeros(len(own), (int(cells.max()) + 1) * (NO_PART + 1), dtype=torch.bool, device=own.device)
    present.scatter_(1, own, True)
    present[:, NO_PART :: NO_PART + 1] = False
    number = (present.cumsum(dim=1) - 1).gather(1, own).view(labels.shape)
    return torch.where(labels == NO_PART, NO_PART, number), present.sum(dim=1)
