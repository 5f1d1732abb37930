"""Class activation maps: a layer's channels weighted by what they mean for the target class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.layers import activations_and_gradients, as_map, default_cam_layer
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class CamOptions:
    """``layer``: a module's name; by default the last feature map, or the last block's first norm on a ViT."""

    layer: str | None = None


@methods.register(
    "grad_cam",
    options=CamOptions,
    paper="Selvaraju et al. 2017, Grad-CAM",
    equation="1-2",
    upsampling="bilinear",
    cost="1 forward + gradient of the layers behind the map",
)
def grad_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions, batch_size: int) -> Tensor:
    """Grad-CAM: ReLU of the channels weighted by their mean gradient, at the map's own resolution."""
    activation, gradient = _map_and_gradient(model, images, targets, options.layer or default_cam_layer(model))
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * activation).sum(dim=1).relu()


def _map_and_gradient(
    model: Classifier, images: Tensor, targets: Tensor, layer: str | None
) -> tuple[Tensor, Tensor]:
    """A layer's map ``[B, C, h, w]`` and the target logit's gradient on it; None is the final feature map."""
    if layer is None:
        return _final_map_and_gradient(model, images, targets)
    activations, gradients = activations_and_gradients(model, images, targets, [layer])
    return as_map(model, activations[layer], layer), as_map(model, gradients[layer], layer)


def _final_map_and_gradient(model: Classifier, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features = model.module.forward_features(images)
    with torch.enable_grad():
        features = features.requires_grad_(True)
        scores = model.module.forward_head(features).gather(1, targets.view(-1, 1)).sum()
        (gradient,) = torch.autograd.grad(scores, features)
    name = "forward_features"
    return as_map(model, features.detach(), name), as_map(model, gradient, name)
