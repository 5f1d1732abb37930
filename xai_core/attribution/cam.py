"""Class activation maps: a layer's channels weighted by what they mean for the target class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.layers import as_map, captured, default_cam_layer, per_class
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
def grad_cam(model: Classifier, images: Tensor, classes: Tensor, options: CamOptions, batch_size: int) -> Tensor:
    """Grad-CAM: ReLU of the channels weighted by their mean gradient, at the map's own resolution."""
    layer, activation, logits = layer_and_logits(model, images, options.layer)

    def weighted(gradients):  # type: ignore[no-untyped-def]
        weights = as_map(model, gradients[0], layer).mean(dim=(2, 3), keepdim=True)
        return (weights * as_map(model, activation.detach(), layer)).sum(dim=1).relu()

    return per_class(logits, classes, [activation], weighted)


def layer_and_logits(model: Classifier, images: Tensor, layer: str | None) -> tuple[str, Tensor, Tensor]:
    """A layer's name, its output as a leaf of the graph, and the logits behind it.

    ``layer`` None is the family's default; on maps that is the final features (timm's ``forward_features``).
    """
    name = layer or default_cam_layer(model)
    with torch.enable_grad():
        if name is None:
            features = model.module.forward_features(images).detach().requires_grad_(True)
            return "forward_features", features, model.module.forward_head(features)
        with captured(model, [name], with_gradient=True) as outputs:
            logits = model(images)
        return name, outputs[name], logits
