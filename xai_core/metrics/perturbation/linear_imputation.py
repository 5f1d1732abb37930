"""Filling removed pixels with weighted means of their neighbours: the linear imputation of ROAD, in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.arithmetic import ratio

# Of the largest value around: far below the 1e-6 by which a direct solver may differ.
TOLERANCE = 1e-9
# Some 25 suffice at any size of image and hole.
MOST_ITERATIONS = 500
# Of a Jacobi step; with these weights the system's largest eigenvalue is 4/3.
DAMPING = 0.8
# Values of images solved at once on a CPU: what stays in its cache takes a third of the time.
CACHED_VALUES = 2**18


@dataclass(frozen=True)
class Grid:
    """One resolution of the multigrid, ``[n, 1, h, w]`` each.

    ``holes``: 1 where a cell is removed, else 0. ``weight``: what the neighbours inside the image weigh together.
    ``step``: what a Jacobi step multiplies the residual by.
    """

    holes: Tensor
    weight: Tensor
    step: Tensor


def impute(images: Tensor, removed: Tensor) -> Tensor:
    """Images whose removed pixels are the weighted mean of their neighbours, removed ones among them.

    Rong et al. 2022 (ROAD), noisy linear imputation without the noise: direct neighbours weigh 1/6, diagonal ones
    1/12, and where some lie outside the image the others share their weight. That is one sparse linear system an
    image, solved by conjugate gradients behind a multigrid cycle.

    Args:
        images: ``[n, C, H, W]``; removed: bool ``[n, H, W]``, at least one pixel of each image kept.

    Raises:
        ArithmeticError: the solver does not converge.
    """
    at_once = max(1, CACHED_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
    pieces = zip(images.split(at_once), removed.unsqueeze(1).split(at_once), strict=True)
    return torch.cat([torch.where(holes, _solve(some, holes), some) for some, holes in pieces])


def _solve(images: Tensor, removed: Tensor) -> Tensor:
    """What removed pixels ``[n, 1, H, W]`` become, every channel a system of its own; 0 elsewhere."""
    grid = _grid(removed, torch.float64)
    # Preconditioning needs some digits only, and single precision takes half the time.
    grids = _grids(removed, torch.float32)
    kept = images.double() * (1 - grid.holes)
    enough = TOLERANCE * _peak(kept)
    residual = grid.holes * _neighbours(kept)
    filled, direction = torch.zeros_like(kept), torch.zeros_like(kept)
    before = torch.ones_like(enough)
    for _ in range(MOST_ITERATIONS):
        # What is done stays as it is, so that no image depends on how long others take.
        active = _peak(residual) > enough
        if not active.any():
            return filled.to(images.dtype)
        corrected = _cycle(residual.float(), grids).double()
        product = _inner(residual, corrected)
        direction = corrected.addcmul_(ratio(product, before), direction)
        moved = grid.holes * (grid.weight * direction - _neighbours(direction))
        step = active * ratio(product, _inner(direction, moved))
        filled.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        before = product
    raise ArithmeticError(f"linear imputation: expected convergence in {MOST_ITERATIONS} iterations, got none")


def _grid(removed: Tensor, dtype: torch.dtype) -> Grid:
    holes = removed.to(dtype)
    weight = _neighbours(torch.ones_like(holes))
    return Grid(holes, weight, DAMPING * holes / weight)


def _grids(removed: Tensor, dtype: torch.dtype) -> list[Grid]:
    """From fine to coarse, each half as wide; a coarse cell is removed where all of its pixels are."""
    grids = [_grid(removed, dtype)]
    while grids[-1].holes.any() and max(grids[-1].holes.shape[-2:]) > 2:
        all_removed = F.max_pool2d(1 - grids[-1].holes, 2, ceil_mode=True) == 0
        grids.append(_grid(all_removed, dtype))
    return grids


def _cycle(residual: Tensor, grids: list[Grid]) -> Tensor:
    """About the solution for a residual: a V-cycle with one Jacobi step before and one after, hence symmetric."""
    grid, *coarser = grids
    found = grid.step * residual
    if coarser:
        left = F.avg_pool2d(_left(residual, found, grid), 2, ceil_mode=True, divisor_override=1)
        correction = _cycle(left * coarser[0].holes, coarser)
        height, width = residual.shape[-2:]
        found.addcmul_(grid.holes, F.interpolate(correction, scale_factor=2.0)[..., :height, :width])
    return found.addcmul_(grid.step, _left(residual, found, grid))


def _left(residual: Tensor, found: Tensor, grid: Grid) -> Tensor:
    """What remains of a residual when ``found`` is taken for its solution."""
    return (_neighbours(found) + residual).addcmul_(grid.weight, found, value=-1).mul_(grid.holes)


def _neighbours(values: Tensor) -> Tensor:
    """Sum over the eight neighbours inside the image, direct ones times 1/6, diagonal ones times 1/12."""
    total = F.pad(values, (1, 1, 1, 1))
    # Weights 1, 2, 1 along either axis: pairs of pairs.
    for _ in range(2):
        total = total[..., :-1, :] + total[..., 1:, :]
    for _ in range(2):
        total = total[..., :-1] + total[..., 1:]
    return total.sub_(values, alpha=4).div_(12)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=(2, 3), keepdim=True)


def _peak(values: Tensor) -> Tensor:
    return values.abs().amax(dim=(2, 3), keepdim=True)
