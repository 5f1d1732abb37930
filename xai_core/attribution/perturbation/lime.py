"""LIME on parts: a ridge regression of the class's probability on which parts are shown (Ribeiro et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from xai_core.attribution.interface import PartScores
from xai_core.attribution.perturbation.coalitions import CoalitionOptions, Design, part_scores
from xai_core.models import Classifier
from xai_core.registry import methods

# Distance of coalitions [S, k] from the whole image; the cosine of a coalition without parts is taken as 0.
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda shown: 1 - shown.mean(dim=1).sqrt(),
    "euclidean": lambda shown: (1 - shown).sum(dim=1).sqrt(),
}


@dataclass(frozen=True)
class LimeOptions(CoalitionOptions):
    """Options of LIME; the defaults are those of the lime package's image explainer.

    ``samples``: coalitions drawn, the whole image included; ``distance`` from the whole image, between the 0/1
    vectors of the parts; ``kernel_width`` of the exponential kernel; ``ridge``: the penalty; ``seed`` of the draw.
    """

    method: ClassVar[str] = "lime"

    baseline: Literal["mean", "black", "blur", "part_mean"] = "part_mean"
    samples: int = 1000
    distance: Literal["cosine", "euclidean"] = "cosine"
    kernel_width: float = 0.25
    ridge: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_least(2, "samples")
        self.expect_at_least(0, "seed")
        self.expect_one_of("distance", tuple(DISTANCES))
        self.expect(self.kernel_width > 0, "kernel_width", "a number > 0")
        self.expect(self.ridge > 0, "ridge", "a number > 0")


@methods.register(
    "lime",
    options=LimeOptions,
    paper='Ribeiro et al. 2016, "Why Should I Trust You?": Explaining the Predictions of Any Classifier',
    equation="2",
    output="parts",
    cost="min(2^K, samples) forwards (1000)",
    gradient_free=True,
)
def lime(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    options: LimeOptions,
    batch_size: int,
) -> PartScores:
    """LIME: a part's coefficient in a ridge regression on random coalitions, nearer ones weighing more."""
    design = partial(lime_design, options=options)
    return part_scores(options.method, model, images, targets, parts, options, design, batch_size)


def lime_design(parts: int, options: LimeOptions) -> Design:
    """The whole image and random coalitions, each part shown with probability 1/2, and the regression on them.

    A coalition drawn several times is shown once and counts as often as it was drawn.
    """
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.rand(options.samples, parts, generator=generator, dtype=torch.float64) < 0.5
    drawn[0] = True
    coalitions, times = drawn.unique(dim=0, return_counts=True)
    distance = DISTANCES[options.distance](coalitions.double())
    weights = times * torch.exp(-0.5 * (distance / options.kernel_width).square())
    return Design(coalitions, ridge_fit(coalitions.double(), weights, options.ridge))


def ridge_fit(shown: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The map from scores ``[S]`` to coefficients ``[k]`` of a weighted ridge regression with a free intercept."""
    centred = shown - (weights / weights.sum()) @ shown
    weighted = centred.T * weights
    penalty = ridge * torch.eye(shown.shape[1], dtype=shown.dtype)
    return torch.linalg.solve(weighted @ centred + penalty, weighted)
