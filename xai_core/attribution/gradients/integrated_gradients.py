"""Integrated gradients, all classes of an image from the same points of the path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xai_core.attribution.gradients.gradient import input_gradients
from xai_core.attribution.gradients.second_order import recomputed
from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import methods

BASELINES = ("black", "mean", "blur")


@dataclass(frozen=True)
class IntegratedGradientsOptions:
    """Options of integrated gradients.

    ``baseline``: ``black`` (zero light), ``mean`` (zero after normalisation) or ``blur`` (the image itself, by a
    Gaussian of 11 pixels); ``steps``: points of the Gauss-Legendre rule along the path, Captum's rule and number.
    """

    steps: int = 50
    baseline: Literal["black", "mean", "blur"] = "black"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"integrated_gradients.steps: expected at least 1, got {self.steps}")
        if self.baseline not in BASELINES:
            raise UsageError(
                f"integrated_gradients.baseline: expected {', '.join(BASELINES)}, got {self.baseline!r}"
            )


@methods.register(
    "integrated_gradients",
    options=IntegratedGradientsOptions,
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks",
    equation="1",
    cost="steps x (forward + 1 input gradient a class)",
    differentiable=True,
)
def integrated_gradients(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    options: IntegratedGradientsOptions,
    batch_size: int,
) -> Tensor:
    """Integrated gradients along the straight path from a baseline, summed over the channels with their sign."""
    count = len(images)
    start = make_baseline(Baseline(options.baseline), model, images)
    path = images - start
    places, weights = (torch.from_numpy(values).to(images) for values in path_rule(options.steps))
    total = images.new_zeros(*classes.shape, *images.shape[-2:])

    def add_pairs(rows: slice) -> None:
        pairs = torch.arange(rows.start, rows.stop, device=images.device)
        step, owner = pairs // count, pairs % count
        points = torch.addcmul(start[owner], places[step].view(-1, 1, 1, 1), path[owner])
        weighted = path[owner] * weights[step].view(-1, 1, 1, 1)
        parts = recomputed(
            lambda at, by: input_gradients(model, at, classes[owner], lambda one: (one * by).sum(dim=1)),
            points,
            weighted,
        )
        total.index_add_(0, owner, parts)

    # The sum is the last thing a pass does, so that one that is halved for want of memory has added nothing.
    run_batches(add_pairs, count * options.steps, batch_size)
    return total


def path_rule(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in (0, 1) and weights, adding to 1, of the Gauss-Legendre rule with so many points."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return (places + 1) / 2, weights / 2
