"""Gradients with respect to the input, and integrated gradients by Captum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.batching import run_smaller
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import methods


def input_gradient(model: Classifier, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of each image's target logit with respect to its pixels, in one pass.

    Returns:
        Logits ``[B, C]`` (detached) and gradients shaped as the images.
    """
    with torch.enable_grad():
        leaves = images.detach().requires_grad_(True)
        logits = model(leaves)
        (gradients,) = torch.autograd.grad(logits.gather(1, targets.view(-1, 1)).sum(), leaves)
    return logits.detach(), gradients


@dataclass(frozen=True)
class IntegratedGradientsOptions:
    """Options of integrated gradients.

    ``baseline``: ``black`` (zero light) or ``mean`` (zero after normalisation); ``steps``: path samples
    of Captum's Gauss-Legendre rule.
    """

    steps: int = 50
    baseline: Literal["black", "mean"] = "black"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"integrated_gradients.steps: expected at least 1, got {self.steps}")


@methods.register(
    "integrated_gradients",
    options=IntegratedGradientsOptions,
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks",
    equation="1",
    cost="steps x (forward + input gradient)",
)
def integrated_gradients(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    options: IntegratedGradientsOptions,
    batch_size: int,
) -> Tensor:
    """Integrated gradients (Captum), summed over the colour channels with their sign."""
    from captum.attr import IntegratedGradients

    black = model.normalise(torch.zeros_like(images[:1]))
    baseline = black.expand_as(images) if options.baseline == "black" else torch.zeros_like(images)
    captum = IntegratedGradients(model.__call__)
    targets = classes[:, 0]

    def in_passes_of(size: int) -> Tensor:
        return captum.attribute(
            images, baselines=baseline, target=targets, n_steps=options.steps, internal_batch_size=size
        )

    # Captum's passes hold (image, step) pairs, at least one step of every image.
    with torch.enable_grad():
        attribution = run_smaller(in_passes_of, max(batch_size, len(images)), least=len(images))
    return attribution.detach().sum(dim=1, keepdim=True)
