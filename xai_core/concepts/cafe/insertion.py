"""The insertion test of a scalar inside the network: how soon evidence that is put back brings it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.concepts.cafe.reading import check_owner, settle, values
from xai_core.concepts.vectors import to_vectors
from xai_core.errors import UsageError
from xai_core.metrics.trajectory import rank_pixels, removed_pixels
from xai_core.models import Classifier
from xai_core.precision import own_modes
from xai_core.receptive_fields.passes import output_of
from xai_core.receptive_fields.scalars import Scalars

BLANK = Baseline("mean")
# The canvases that are of each image; the others are the same for all.
OF_THE_IMAGE = ("blur",)
# Patches of a network of maps, as many as a ViT of patches of 16 pixels has at 224.
GRID = (14, 14)


@dataclass(frozen=True)
class InsertionCurve:
    """How much of each scalar is back after each step of putting patches onto a blank canvas.

    ``fraction`` ``[S + 1]``: the share of patches that are there; ``recovered`` ``[N, S + 1]``: the scalar over
    its value on the clean image, 1 at the last step; it may exceed 1 and be negative. ``area`` ``[N]``: the area
    under the curve, by the trapezoid with both ends. NaN where the clean value is 0, so that nothing can be
    recovered, and where all patches are equally important, so that nothing is ranked.
    """

    fraction: Tensor
    recovered: Tensor
    area: Tensor


def insertion(
    model: Classifier,
    images: Tensor,
    scalars: Scalars,
    maps: Mapping[str, Tensor],
    *,
    grid: tuple[int, int] | None = None,
    steps: int | None = None,
    blank: Baseline = BLANK,
    batch_size: int = 32,
) -> dict[str, InsertionCurve]:
    """Insertion curves of scalars under each of several rankings of the patches (iERF, section V-C1).

    Patches are put back in falling order of importance, ties in index order, and the scalar is read again as it
    was explained: a maximum at the position that holds it on the clean image. The network runs up to the scalars'
    layer only; what all rankings share, the clean image and the blank canvas, is run once.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; scalars: N of them, ``scalars.owner`` says of which image.
        maps: importance ``[N, h, w]`` by name, of any resolution: averaged over each patch.
        grid: rows and columns of patches; a ViT's own tokens and 14 x 14 on maps where None.
        steps: into how many the patches are cut; one patch a step where None.
        blank: the canvas; the mean of the model's training images (normalised 0) by default.

    Returns:
        A curve for each map, on the images' device.

    Raises:
        UsageError: maps that do not fit the scalars, or a grid or steps that do not fit the image.
    """
    rows, columns = grid or (model.token_grid if model.family == "vit" else GRID)
    patches = rows * columns
    steps = patches if steps is None else steps
    _check_request(images, scalars, maps, (rows, columns), steps)
    with own_modes("fp32", images.device):
        scalars, clean = settle(model, images, scalars, batch_size)
        importance = [F.adaptive_avg_pool2d(some.to(images), (rows, columns)) for some in maps.values()]
        run = _Insertion(
            model=model,
            images=images,
            canvas=make_baseline(blank, model, images if blank.kind in OF_THE_IMAGE else images[:1]),
            scalars=scalars,
            ranks=torch.stack([rank_pixels(one).position for one in importance]),
            inserted=removed_pixels(patches, steps).to(images.device),
        )
        empty = values(model, run.canvas, run.canvas_of(run.owner), scalars, batch_size)
        between = torch.cat([clean[:0], *run_batches(run.read, len(run), batch_size)])
        between = between.view(len(maps), steps - 1, len(clean)).transpose(1, 2)
        ends = (value.view(1, -1, 1).expand(len(maps), -1, -1) for value in (empty, clean))
        whole = torch.cat([next(ends), between, next(ends)], dim=2)
        undefined = torch.stack([_even(one) for one in importance]) | (clean == 0)
        recovered = whole / torch.where(undefined, torch.nan, clean).unsqueeze(2)
        fraction = run.inserted.to(recovered) / patches
        areas = torch.trapezoid(recovered, fraction, dim=2)
    return {
        name: InsertionCurve(fraction, curve, area)
        for name, curve, area in zip(maps, recovered, areas, strict=True)
    }


def _even(importance: Tensor) -> Tensor:
    """Which maps ``[N, rows, columns]`` have one value for several patches, ``[N]``."""
    cells = importance.flatten(1)
    return (cells == cells[:, :1]).all(dim=1) & (cells.shape[1] > 1)


@dataclass(frozen=True)
class _Insertion:
    """All partial images as one flat list: map by map, step by step, scalar by scalar."""

    model: Classifier
    images: Tensor
    canvas: Tensor
    scalars: Scalars
    # Their places in the order of insertion, [maps, N, rows, columns].
    ranks: Tensor
    # How many patches are there at each step, [S + 1].
    inserted: Tensor

    @property
    def owner(self) -> Tensor:
        return self.scalars.owner.to(self.images.device)

    def canvas_of(self, owner: Tensor) -> Tensor:
        """Which canvas an image has."""
        return owner if len(self.canvas) == len(self.images) else torch.zeros_like(owner)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self.ranks), len(self.inserted) - 2, self.ranks.shape[1]

    def __len__(self) -> int:
        return math.prod(self._shape)

    def read(self, rows: slice) -> Tensor:
        """The scalars on some of the partial images, ``[n]``."""
        flat = torch.arange(rows.start, rows.stop, device=self.images.device)
        chosen, step, which = torch.unravel_index(flat, self._shape)
        there = self._of_pixels(self.ranks[chosen, which] < self.inserted[step + 1].view(-1, 1, 1))
        owner = self.owner[which]
        seen = torch.where(there.unsqueeze(1), self.images[owner], self.canvas[self.canvas_of(owner)])
        layer = self.scalars.layer
        return self.scalars(to_vectors(self.model, output_of(self.model, seen, layer), layer), which)

    def _of_pixels(self, patches: Tensor) -> Tensor:
        """A mask of patches ``[n, rows, columns]`` as one of pixels, of as equal patches as whole pixels make."""
        sides = zip(self.images.shape[-2:], patches.shape[-2:], strict=True)
        row, column = (torch.arange(pixels, device=patches.device) * cells // pixels for pixels, cells in sides)
        return patches[:, row][:, :, column]


def _check_request(
    images: Tensor, scalars: Scalars, maps: Mapping[str, Tensor], grid: tuple[int, int], steps: int
) -> None:
    check_owner(images, scalars.owner)
    count = len(scalars.owner)
    if not maps:
        raise UsageError("maps: expected at least one ranking of the patches, got none")
    for name, some in maps.items():
        if some.ndim != 3 or len(some) != count or not some.isfinite().all():
            raise UsageError(
                f"maps: expected finite importance [{count}, h, w], one map a scalar, got {name!r} of shape "
                f"{tuple(some.shape)}{'' if some.isfinite().all() else ' with NaN or infinity'}"
            )
    if not all(1 <= cells <= pixels for cells, pixels in zip(grid, images.shape[-2:], strict=True)):
        raise UsageError(f"grid: expected 1 to {tuple(images.shape[-2:])} rows and columns, got {grid}")
    if not 1 <= steps <= grid[0] * grid[1]:
        raise UsageError(f"steps: expected 1 to {grid[0] * grid[1]} (the number of patches), got {steps}")
