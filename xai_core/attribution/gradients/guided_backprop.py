"""Guided backpropagation, alone and times Grad-CAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.attribution.cam.gradient_cam import CamOptions, grad_cam, readable_layer
from xai_core.attribution.gradients.gradient import CHANNELS, Channels, check_channels
from xai_core.attribution.gradients.operations import (
    MAX_POOLING,
    NORMALISATION,
    graph_nodes,
    is_relu,
    listed,
    operations_of,
)
from xai_core.attribution.gradients.second_order import linked, plain_calls
from xai_core.attribution.interface import upsample_map
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.registry import methods


def relu_network(model: Classifier, _options: Any) -> str | None:
    """ReLU, or ReLU6, as the only activation function."""
    found = operations_of(model)
    others = found - {"ReLU", MAX_POOLING} - NORMALISATION
    if others:
        return (
            f"guided backpropagation is a rule for ReLU, and this network computes {listed(others)}, "
            "where its result would be a plain gradient"
        )
    return None if "ReLU" in found else "it has no ReLU, so guided backpropagation is its plain gradient"


def guided_gradients(
    model: Classifier, images: Tensor, classes: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``reduce`` makes of each class's guided gradients ``[B, 3, H, W]``: ``[B, K, ...]``.

    The rule hangs on the nodes of this pass's graph and goes with it: nothing is hung on the model. Images that
    require gradients are differentiated through.
    """
    twice = images.requires_grad
    leaves = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = (_linked_logits if twice else _hooked_logits)(model, images, leaves)
    return per_class(logits, classes, [leaves], lambda gradients: reduce(gradients[0]), create_graph=twice)


def _hooked_logits(model: Classifier, _images: Tensor, leaves: Tensor) -> Tensor:
    logits = model(leaves)
    for node in graph_nodes(logits):
        if is_relu(node):
            node.register_hook(_keep_positive)
    return logits


def _linked_logits(model: Classifier, images: Tensor, leaves: Tensor) -> Tensor:
    def watch(output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient.clamp(min=0))

    with linked(plain_calls(model, images), watch):
        return model(leaves)


def _keep_positive(gradients: tuple[Tensor | None, ...], _later: object) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in gradients)


@dataclass(frozen=True)
class GuidedBackpropOptions:
    """``channels``: how a pixel's value comes from its channels, as in ``gradient``."""

    channels: Channels = "max_abs"

    def __post_init__(self) -> None:
        check_channels("guided_backprop", self.channels)


@methods.register(
    "guided_backprop",
    options=GuidedBackpropOptions,
    paper="Springenberg et al. 2015, Striving for Simplicity",
    equation="section 3.4, figure 1",
    needs=(relu_network,),
    cost="1 forward + 1 input gradient a class",
    differentiable=True,
)
def guided_backprop(
    model: Classifier, images: Tensor, classes: Tensor, options: GuidedBackpropOptions, batch_size: int
) -> Tensor:
    """Guided backpropagation: the gradient, of which each ReLU passes back only the positive part."""
    return guided_gradients(model, images, classes, CHANNELS[options.channels])


@dataclass(frozen=True)
class GuidedGradCamOptions:
    """``layer``: of Grad-CAM, by default as there; ``channels``: how a pixel's channels become one value."""

    layer: str | None = None
    channels: Channels = "max_abs"

    def __post_init__(self) -> None:
        check_channels("guided_grad_cam", self.channels)


@methods.register(
    "guided_grad_cam",
    options=GuidedGradCamOptions,
    paper="Selvaraju et al. 2017, Grad-CAM",
    equation="section 3.2",
    needs=(relu_network, readable_layer),
    cost="2 forwards + 1 input gradient and a gradient behind the layer a class",
    differentiable=True,
)
def guided_grad_cam(
    model: Classifier, images: Tensor, classes: Tensor, options: GuidedGradCamOptions, batch_size: int
) -> Tensor:
    """Guided Grad-CAM: guided backpropagation times Grad-CAM, enlarged bilinearly to the input's size."""
    cams = grad_cam(model, images, classes, CamOptions(options.layer), batch_size)
    cams = upsample_map(cams.flatten(0, 1), images.shape[-2:], "bilinear").unflatten(0, classes.shape)
    # Grad-CAM is not negative and the same for all channels: it may be multiplied after they are joined.
    return guided_gradients(model, images, classes, CHANNELS[options.channels]).mul_(cams)
