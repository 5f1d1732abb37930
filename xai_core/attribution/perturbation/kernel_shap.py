"""Kernel SHAP: Shapley values of parts or of grid cells by weighted least squares (Lundberg & Lee 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.interface import PartScores
from xai_core.attribution.perturbation.coalitions import (
    CoalitionOptions,
    Design,
    Players,
    fit_coalitions,
    part_scores,
)
from xai_core.attribution.perturbation.masking import Scalar, cells_fit
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class KernelShapOptions(CoalitionOptions):
    """Options of Kernel SHAP.

    ``samples``: the most masked pictures of an image, the clean one and the fully masked one included (2048 is the
    shap package's, without its 2K more): with 2^K of them or more all coalitions are shown and the values are
    exact. ``seed`` of the draw where they are not.
    """

    method: ClassVar[str] = "kernel_shap"

    scalar: Scalar = "logit"
    samples: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_least(2, "samples")
        self.expect_at_least(0, "seed")


@dataclass(frozen=True)
class KernelShapPatchesOptions(KernelShapOptions):
    """As for Kernel SHAP; ``grid``: cells a side, each of them a player; ``part_mean`` is a cell's mean colour."""

    method: ClassVar[str] = "kernel_shap_patches"

    grid: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_least(1, "grid")
        self.expect(
            self.samples >= fewest_samples(self.grid**2),
            "samples",
            f"at least {fewest_samples(self.grid**2)} for {self.grid**2} cells",
        )


@methods.register(
    "kernel_shap",
    options=KernelShapOptions,
    paper="Lundberg & Lee 2017, A Unified Approach to Interpreting Model Predictions",
    equation="theorem 2",
    output="parts",
    cost="min(2^K, samples) forwards (2048)",
    gradient_free=True,
)
def kernel_shap(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    options: KernelShapOptions,
    batch_size: int,
) -> PartScores:
    """Kernel SHAP: Shapley values of the parts; they add up to f(image) - f(image masked as a whole)."""
    design = partial(shapley_design, options=options)
    return part_scores(options.method, model, images, targets, parts, options, design, batch_size)


@methods.register(
    "kernel_shap_patches",
    options=KernelShapPatchesOptions,
    paper="Lundberg & Lee 2017, A Unified Approach to Interpreting Model Predictions",
    equation="theorem 2",
    needs=(cells_fit,),
    upsampling="nearest",
    cost="samples forwards (2048)",
    gradient_free=True,
)
def kernel_shap_patches(
    model: Classifier, images: Tensor, classes: Tensor, options: KernelShapPatchesOptions, batch_size: int
) -> Tensor:
    """Kernel SHAP over the cells of a square grid: a Shapley value a cell."""
    cells = options.grid**2
    players = Players.of(grid_labels(images, options.grid), no_part=cells)
    design = partial(shapley_design, options=options)
    scores = fit_coalitions(model, images, classes, players, options, design, batch_size)
    return scores.transpose(1, 2).unflatten(2, (options.grid, options.grid))


def grid_labels(images: Tensor, grid: int) -> Tensor:
    """Cell of every pixel, ``[B, H, W]``, counted row by row."""
    cells = torch.arange(grid**2, dtype=torch.float32, device=images.device).view(1, 1, grid, grid)
    # The rule by which the interface enlarges the map, so that a cell's value lies on the cell's own pixels.
    return F.interpolate(cells, size=images.shape[-2:], mode="nearest")[0].long().expand(len(images), -1, -1)


def fewest_samples(parts: int) -> int:
    """Coalitions without which the regression has no single solution: single parts, all but one, none and all."""
    return min(2**parts, 2 * parts + 2)


def shapley_design(parts: int, options: KernelShapOptions) -> Design:
    """Coalitions of ``parts`` players and the map from their scores to (estimated) Shapley values.

    Raises:
        UsageError: fewer samples than the parts need.
    """
    if options.samples < fewest_samples(parts):
        raise UsageError(
            f"{options.method}.samples: expected at least {fewest_samples(parts)} for an image of {parts} parts, "
            f"got {options.samples}"
        )
    coalitions, weights = weighted_coalitions(parts, options.samples - 2, options.seed)
    ends = torch.stack([torch.zeros(parts), torch.ones(parts)]).bool()
    return Design(torch.cat([ends, coalitions]), constrained_fit(coalitions, weights))


def weighted_coalitions(parts: int, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions other than none and all, ``[S, parts]`` bool, with their weights in the regression ``[S]``.

    Sizes are completed from outside in, a size and its opposite together, for as long as a fair share of the
    remaining budget covers them; the rest is drawn from the other sizes, each coalition with its opposite. The
    first sizes (single parts, and all but one) are always there: they alone determine the fit.
    """
    left = {size: (parts - 1) / (size * (parts - size)) for size in range(1, parts)}
    coalitions = [torch.zeros(0, parts, dtype=torch.bool)]
    weights = [torch.zeros(0, dtype=torch.float64)]
    for size in range(1, parts // 2 + 1):
        both = sorted({size, parts - size})
        each = comb(parts, size)
        share = budget * sum(left[one] for one in both) / sum(left.values())
        if size > 1 and len(both) * each > share * (1 + 1e-9):
            break
        coalitions += [all_of_size(parts, one) for one in both]
        weights += [torch.full((each,), left.pop(one) / each, dtype=torch.float64) for one in both]
        budget -= len(both) * each
    if left and budget >= 2:
        drawn, times = draw_pairs(parts, left, budget // 2, seed)
        coalitions.append(drawn)
        weights.append(times * (sum(left.values()) / times.sum()))
    return torch.cat(coalitions), torch.cat(weights)


def all_of_size(parts: int, size: int) -> Tensor:
    """Every coalition of that size, ``[parts choose size, parts]`` bool."""
    members = torch.tensor(list(combinations(range(parts), size)), dtype=torch.int64).view(-1, size)
    return torch.zeros(len(members), parts, dtype=torch.bool).scatter_(1, members, True)


def draw_pairs(parts: int, mass: dict[int, float], pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions drawn with their opposites, sizes in proportion to ``mass``: the distinct ones and how often."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(sorted(mass))
    chances = torch.tensor([mass[int(size)] for size in sizes], dtype=torch.float64)
    size = sizes[torch.multinomial(chances, pairs, replacement=True, generator=generator)]
    ranks = torch.rand(pairs, parts, generator=generator, dtype=torch.float64).argsort(dim=1).argsort(dim=1)
    drawn = ranks < size.unsqueeze(1)
    distinct, times = torch.cat([drawn, ~drawn]).unique(dim=0, return_counts=True)
    return distinct, times.double()


def constrained_fit(coalitions: Tensor, weights: Tensor) -> Tensor:
    """The least-squares map under the efficiency constraint, ``[k, 2 + S]``: from scores of none, all and these.

    Minimises sum_s w_s (y_s - y_none - z_s . phi)^2 subject to 1 . phi = y_all - y_none (Lagrange multiplier).
    """
    shown = coalitions.double()
    ones = shown.new_ones(shown.shape[1])
    if not len(shown):
        interior = shown.new_zeros(len(ones), 0)
        whole = ones / len(ones)
    else:
        weighted = shown.T * weights
        solved = torch.linalg.solve(weighted @ shown, torch.cat([weighted, ones.unsqueeze(1)], dim=1))
        free, direction = solved[:, :-1], solved[:, -1]
        whole = direction / direction.sum()
        interior = free - whole.unsqueeze(1) * free.sum(dim=0)
    nothing = -interior.sum(dim=1) - whole
    return torch.cat([nothing.unsqueeze(1), whole.unsqueeze(1), interior], dim=1)
