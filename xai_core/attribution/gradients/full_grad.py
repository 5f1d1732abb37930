"""FullGrad: the input's gradient term and the gradient terms of every bias, explicit or implicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.gradients.interception import ELEMENTWISE_FUNCTIONS, Interception, Rule, slope, unary
from xai_core.attribution.gradients.operations import (
    ELEMENTWISE,
    MAX_POOLING,
    listed,
    operations_of,
)
from xai_core.attribution.interface import upsample_map
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image
from xai_core.registry import methods

Visit = Callable[[Tensor], None]
# f(a) = f'(a) a: no implicit bias.
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu"})


def full_gradients(
    model: Classifier, images: Tensor, classes: Tensor, summary: Callable[[Tensor], Tensor]
) -> Tensor:
    """The sum over all terms of the full-gradient decomposition of what ``summary`` makes of each.

    Terms are the input times its gradient ``[B, 3, H, W]`` and, for every layer, bias times gradient in the
    layer's own shape: biases of convolutions and linear layers, -mean * weight / std + bias of a batch
    normalisation, and f(a) - f'(a) a of an activation function that is not a ReLU. Their sum is the logit.

    Args:
        summary: one term to ``[B, ...]``, always of the same shape; it is called during the backward pass, so that
            no more than one term is held.

    Returns:
        ``[B, K, ...]``.
    """
    gathered: list[Tensor] = []

    def visit(term: Tensor) -> None:
        value = summary(term)
        gathered[:] = [gathered[0].add_(value) if gathered else value]

    with torch.enable_grad(), Interception(_rules(visit)):
        leaves = images.detach().requires_grad_(True)
        logits = model(leaves)

    def all_terms(gradients: Any) -> Tensor:
        visit(images * gradients[0])
        return gathered.pop()

    return per_class(logits, classes, [leaves], all_terms)


def _rules(visit: Visit) -> dict[str, Rule]:
    """What to do at each function that adds a bias: hang a hook on its output, which the graph takes with it."""

    def watch(output: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and output.requires_grad:
            output.register_hook(lambda gradient: visit(gradient * bias))
        return output

    def convolution(
        function: Rule, values: Tensor, weight: Tensor, bias: Any = None, *rest: Any, **named: Any
    ) -> Tensor:
        output = function(values, weight, bias, *rest, **named)
        return watch(output, None if bias is None else bias.view(-1, 1, 1))

    def linear(function: Rule, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return watch(function(values, weight, bias), bias)

    def batch_norm(
        function: Rule,
        values: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        output = function(values, mean, variance, weight, bias, training, momentum, eps)
        if mean is None or variance is None or training:
            return output  # statistics of the values themselves: standardised weights, not a layer with a bias
        shift = -mean * (variance + eps).rsqrt() * (1 if weight is None else weight) + (
            0 if bias is None else bias
        )
        return watch(output, shift.view(-1, 1, 1))

    def activation(function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        apply = unary(function, rest, named)
        output = apply(values)
        inner = values.detach()
        return watch(output, output.detach() - slope(apply, inner) * inner)

    curved = [name for name in ELEMENTWISE_FUNCTIONS if name not in HOMOGENEOUS]
    return {"conv2d": convolution, "linear": linear, "batch_norm": batch_norm, **dict.fromkeys(curved, activation)}


def rescaled_magnitude(term: Tensor, size: tuple[int, int]) -> Tensor:
    """The paper's psi summed over a layer's channels: magnitudes scaled to [0, 1] an image and layer, enlarged.

    A term without places (a linear layer's, a map of one position) has no map and counts 0. A constant one, too.

    Args:
        term: ``[B, C, h, w]``, or any shape without places; size: H, W.

    Returns:
        ``[B, H, W]`` float32 (float64 where the term is).
    """
    magnitude = wide(term.abs())
    if term.ndim != 4 or term.shape[2] * term.shape[3] == 1:
        return magnitude.new_zeros(len(term), *size)
    least = magnitude.amin(dim=(1, 2, 3)).view(-1, 1, 1)
    span = magnitude.amax(dim=(1, 2, 3)).view(-1, 1, 1) - least
    # The channels are added before the enlargement, which is linear: one picture instead of hundreds.
    total = magnitude.sum(dim=1) - term.shape[1] * least
    return upsample_map(total / torch.where(span > 0, span, torch.ones_like(span)), size, "bilinear").clone()


@once_per_model
def _incomplete(model: Classifier) -> str | None:
    others = operations_of(model) - ELEMENTWISE - {MAX_POOLING}
    if others:
        return f"it has {listed(others)}"
    image = probe_image(model).detach()

    def sums(term: Tensor) -> Tensor:
        flat = term.flatten(1).double()
        return torch.stack([flat.sum(dim=1), flat.abs().sum(dim=1)], dim=1)

    with torch.no_grad():
        logit = model(image)[0, 0].double()
        total, size = full_gradients(model, image, image.new_zeros(1, 1).long(), sums)[0, 0]
    if (total - logit).abs() > 1e-4 * size:
        return f"the terms of its logit add to {float(total):.4g} instead of {float(logit):.4g}"
    return None


def complete_biases(model: Classifier, _options: Any) -> str | None:
    """A logit that is the sum of the input's gradient term and the biases' gradient terms.

    Convolutions, batch normalisations and linear layers with element-wise activations and max pooling.
    """
    reason = _incomplete(model)
    if reason is None:
        return None
    return (
        "FullGrad's terms, of convolutions, linear layers, batch normalisations and element-wise activations, "
        f"do not make up its logit: {reason}"
    )


@methods.register(
    "full_grad",
    paper="Srinivas & Fleuret 2019, Full-Gradient Representation for Neural Network Visualization",
    equation="full-gradient decomposition (section 3), FullGrad saliency (section 4)",
    families=("cnn",),
    needs=(complete_biases,),
    cost="1 forward + 1 input gradient a class",
)
def full_grad(model: Classifier, images: Tensor, classes: Tensor, options: object, batch_size: int) -> Tensor:
    """FullGrad: magnitudes of the input's and every bias's gradient term, each scaled to [0, 1], added up."""
    height, width = images.shape[-2:]
    return full_gradients(model, images, classes, lambda term: rescaled_magnitude(term, (height, width)))
