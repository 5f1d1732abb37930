"""Class activation maps from gradients: a layer's channels weighted by what they mean for the target class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.errors import UsageError
from xai_core.layers import Stage, as_map, captured, default_cam_layer, layer_problem, per_class
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class CamOptions:
    """``layer``: a module's name; by default the last feature map, or the last block's first norm on a ViT."""

    layer: str | None = None


@dataclass(frozen=True)
class LayerCamOptions:
    """``stage``: ``high`` as Grad-CAM, ``low`` an early map of finer cells; ``layer``: a module's name instead."""

    layer: str | None = None
    stage: Stage = "high"

    def __post_init__(self) -> None:
        if self.stage not in ("high", "low"):
            raise UsageError(f"layer_cam.stage: expected high or low, got {self.stage!r}")
        if self.layer is not None and self.stage != "high":
            raise UsageError(
                f"layer_cam.stage: expected its default beside layer={self.layer!r}, got {self.stage!r}; set one"
            )


def readable_layer(model: Classifier, options: Any) -> str | None:
    """A layer with a spatial map that influences the logits: the one named, or by default the family's."""
    try:
        name = chosen_layer(model, options)
    except UsageError as error:
        return str(error)
    return None if name is None else layer_problem(model, name)


def chosen_layer(model: Classifier, options: Any) -> str | None:
    """The name of the layer that the options ask for; None is the final features of a network of maps.

    Raises:
        UsageError: none is named, and the model has no such layer as the family's rule names.
    """
    if options.layer is not None:
        return str(options.layer)
    return default_cam_layer(model, getattr(options, "stage", "high"))


@methods.register(
    "grad_cam",
    options=CamOptions,
    paper="Selvaraju et al. 2017, Grad-CAM",
    equation="1-2",
    needs=(readable_layer,),
    upsampling="bilinear",
    cost="1 forward + gradient of the layers behind the map",
    differentiable=True,
)
def grad_cam(model: Classifier, images: Tensor, classes: Tensor, options: CamOptions, batch_size: int) -> Tensor:
    """Grad-CAM: ReLU of the channels weighted by their mean gradient, at the map's own resolution."""

    def combine(maps: Tensor, gradients: Tensor) -> Tensor:
        return weighted_sum(maps, gradients.mean(dim=(2, 3))).relu()

    return _gradient_cam(model, images, classes, options, combine)


@methods.register(
    "grad_cam_pp",
    options=CamOptions,
    paper="Chattopadhay et al. 2018, Grad-CAM++",
    equation="5, 7, 19",
    needs=(readable_layer,),
    upsampling="bilinear",
    cost="1 forward + gradient of the layers behind the map",
    differentiable=True,
)
def grad_cam_pp(
    model: Classifier, images: Tensor, classes: Tensor, options: CamOptions, batch_size: int
) -> Tensor:
    """Grad-CAM++: channels weighted by their positive gradients, each position by its alpha, for exp of the logit.

    The second and third derivatives of exp(S) are taken as the square and cube of the logit's gradient times
    exp(S), as in the paper: exact where the network behind the layer is piecewise linear. The alphas are made of
    the maps through a ReLU, as all of the paper's are.
    """

    def combine(maps: Tensor, gradients: Tensor) -> Tensor:
        # Equation 19 with a square of the gradient cancelled: alpha = 1 / (2 + g sum(A)); only g > 0 gets weight.
        # exp(S) is one positive factor of the whole map, and soon beyond float32: left out. With a negative sum,
        # alpha has a pole, and noise of a thousandth in the picture decides what the map shows.
        positive = gradients.relu()
        alpha = 1 / (2 + positive * maps.relu().sum(dim=(2, 3), keepdim=True))
        return weighted_sum(maps, (alpha * positive).sum(dim=(2, 3))).relu()

    return _gradient_cam(model, images, classes, options, combine)


@methods.register(
    "xgrad_cam",
    options=CamOptions,
    paper="Fu et al. 2020, Axiom-based Grad-CAM",
    equation="7-8",
    needs=(readable_layer,),
    upsampling="bilinear",
    cost="1 forward + gradient of the layers behind the map",
    differentiable=True,
)
def xgrad_cam(model: Classifier, images: Tensor, classes: Tensor, options: CamOptions, batch_size: int) -> Tensor:
    """XGrad-CAM: ReLU of the channels weighted by their gradients, averaged in proportion to the activation.

    The proportions are those of the maps through a ReLU, as all of the paper's are.
    """

    def combine(maps: Tensor, gradients: Tensor) -> Tensor:
        # Of a signed map the sum may be next to nothing, and the quotient anything.
        present = maps.relu()
        total = present.sum(dim=(2, 3))
        weights = (present * gradients).sum(dim=(2, 3)) / torch.where(total > 0, total, 1)
        return weighted_sum(maps, weights).relu()

    return _gradient_cam(model, images, classes, options, combine)


@methods.register(
    "layer_cam",
    options=LayerCamOptions,
    paper="Jiang et al. 2021, LayerCAM",
    equation="6-8",
    needs=(readable_layer,),
    upsampling="bilinear",
    cost="1 forward + gradient of the layers behind the map",
    differentiable=True,
)
def layer_cam(
    model: Classifier, images: Tensor, classes: Tensor, options: LayerCamOptions, batch_size: int
) -> Tensor:
    """LayerCAM: every position of every channel weighted by its own positive gradient, for maps of any stage."""

    def combine(maps: Tensor, gradients: Tensor) -> Tensor:
        return (gradients.relu() * maps).sum(dim=1).relu()

    return _gradient_cam(model, images, classes, options, combine)


def layer_and_logits(model: Classifier, images: Tensor, layer: str | None) -> tuple[str, Tensor, Tensor]:
    """A layer's name, its output, where the graph begins, and the logits behind it.

    With images that require gradients the graph goes on to them. ``layer`` None is the family's default; on maps
    that is the final features (timm's ``forward_features``).
    """
    name = default_cam_layer(model) if layer is None else layer
    with torch.enable_grad():
        if name is None:
            features = model.module.forward_features(images)
            features = features if images.requires_grad else features.detach().requires_grad_(True)
            return "forward_features", features, model.module.forward_head(features)
        with captured(model, [name], with_gradient=True) as outputs:
            logits = model(images)
        return name, outputs[name], logits


def weighted_sum(maps: Tensor, weights: Tensor) -> Tensor:
    """Maps ``[B, C, h, w]`` weighted channel by channel ``[B, C]`` and added up, ``[B, h, w]``."""
    return torch.einsum("bchw,bc->bhw", maps, weights)


def most_varied_channels(maps: Tensor, count: int | None) -> Tensor:
    """The ``count`` channels of each map ``[B, C, h, w]`` with the largest variance over cells, ``[B, count]``.

    All of them, in their order, where ``count`` is None or there are no more.
    """
    images, channels = maps.shape[:2]
    if count is None or count >= channels:
        return torch.arange(channels, device=maps.device).expand(images, -1)
    return maps.flatten(2).var(dim=2, correction=0).topk(count, dim=1).indices


def _gradient_cam(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    options: CamOptions | LayerCamOptions,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What ``combine`` makes of a layer's maps and of their gradients, both ``[B, C, h, w]``, class by class."""
    layer, activation, logits = layer_and_logits(model, images, chosen_layer(model, options))
    twice = images.requires_grad
    maps = wide(as_map(model, activation if twice else activation.detach(), layer))
    return per_class(
        logits,
        classes,
        [activation],
        lambda gradients: combine(maps, wide(as_map(model, gradients[0], layer))),
        create_graph=twice,
    )
