"""Showing a network one segment of a picture and nothing else: no grey region, no border for it to see."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from xai_core.layers import as_map
from xai_core.models import Classifier

# Modules with windows: at a segment's border these look over it.
_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def linear_head(model: Classifier, _options: Any) -> str | None:
    """A head that ends in one linear layer on one feature vector, whose weights say what each direction adds."""
    classifier = _classifier(model)
    if isinstance(classifier, nn.Linear) and classifier.out_features == model.num_classes:
        return None
    return f"its logits are not one linear layer of one feature vector, but {_described(classifier)}"


def maskable(model: Classifier, _options: Any) -> str | None:
    """Convolutions, or tokens whose attention can be masked: else a segment cannot be shown alone."""
    if model.family == "cnn":
        return None
    if "attn_mask" in inspect.signature(model.module.forward_features).parameters:
        return None
    return "its forward_features takes no attention mask, so tokens outside a segment cannot be left out"


def head_weights(model: Classifier) -> tuple[Tensor, Tensor | None]:
    """Weight ``[classes, C]`` and bias ``[classes]`` of the linear layer that gives the logits."""
    classifier = _classifier(model)
    return classifier.weight, classifier.bias


def segment_features(model: Classifier, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The feature vector that enters the head's linear layer when only a segment of each image is seen.

    On maps this is layer masking (Balasubramanian and Feizi 2023), as in HU-MCD: before every window that reaches
    over the segment's border, the features outside are the mean of their neighbours inside, and zero farther out;
    the head pools the inside alone. On tokens those outside take no part in the attention and are not pooled.

    Args:
        images: ``[B, 3, H, W]``; masks: bool ``[B, H, W]``, each with a pixel at least.

    Returns:
        Features ``[B, C]`` and logits ``[B, classes]``.
    """
    with _masked_windows(model, masks), _classifier_input(model) as entered:
        options = {"attn_mask": _attention_mask(model, masks)} if model.family == "vit" else {}
        features = model.module.forward_features(images, **options)
        logits = model.module.forward_head(_fill_outside(model, features, masks))
    return entered[0].to(images.dtype), logits.to(images.dtype)


def inside_at(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """A segment at a map's resolution ``[B, 1, h, w]``: a position is inside where any of its pixels is."""
    return F.adaptive_max_pool2d(masks.float().unsqueeze(1), (size[0], size[1])) > 0


def pad_from_neighbours(values: Tensor, inside: Tensor, reach: int) -> Tensor:
    """Features outside a segment as the mean of their known neighbours, ring by ring; zero beyond ``reach``.

    Args:
        values: ``[B, C, h, w]``; inside: bool ``[B, 1, h, w]``; reach: rings of positions to fill.
    """
    known = inside.to(values.dtype)
    filled = values * known
    for _ in range(reach):
        total, weight = (F.avg_pool2d(one, 3, 1, 1) for one in (filled, known))
        ring = (known == 0) & (weight > 0)
        filled = torch.where(ring, total / weight.clamp(min=1e-6), filled)
        known = (weight > 0).to(values.dtype)
    return filled


@contextmanager
def _masked_windows(model: Classifier, masks: Tensor) -> Iterator[None]:
    def mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        reach = _reach(module)
        if not reach or inputs[0].ndim != 4:
            return None
        values = inputs[0]
        return (pad_from_neighbours(values, inside_at(masks, tuple(values.shape[-2:])), reach), *inputs[1:])

    # On tokens the only convolution cuts patches, and attention leaves out those outside.
    windowed = [one for one in model.module.modules() if isinstance(one, _WINDOWED)]
    handles = [one.register_forward_pre_hook(mask) for one in windowed] if model.family == "cnn" else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reach(module: nn.Module) -> int:
    """How far the windows of a module that touch a segment reach over its border, in positions."""
    sizes = [_largest(getattr(module, name, 1)) for name in ("kernel_size", "stride", "dilation")]
    kernel, stride, dilation = sizes
    return dilation * (kernel // 2) + stride - 1 if kernel > 1 else 0


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, tuple) else int(value)


@contextmanager
def _classifier_input(model: Classifier) -> Iterator[list[Tensor]]:
    entered: list[Tensor] = []
    handle = _classifier(model).register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0]))
    try:
        yield entered
    finally:
        handle.remove()


def _attention_mask(model: Classifier, masks: Tensor) -> Tensor:
    """Which tokens each token may look at, ``[B, 1, T, T]``: the prefix, and the patches inside."""
    patches = inside_at(masks, model.token_grid).flatten(1)
    tokens = torch.cat([patches.new_ones(len(patches), model.num_prefix_tokens), patches], dim=1)
    return tokens[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)


def _fill_outside(model: Classifier, features: Tensor, masks: Tensor) -> Tensor:
    """Final features with the mean inside the segment at every position outside: pooling all pools the inside."""
    spatial = as_map(model, features, "forward_features")
    inside = inside_at(masks, tuple(spatial.shape[-2:]))
    share = inside.to(spatial.dtype)
    mean = (spatial * share).sum(dim=(2, 3), keepdim=True) / share.sum(dim=(2, 3), keepdim=True)
    filled = torch.where(inside, spatial, mean)
    if model.family == "vit":
        prefix = features[:, : model.num_prefix_tokens]
        return torch.cat([prefix, filled.flatten(2).transpose(1, 2)], dim=1)
    return filled.permute(0, 2, 3, 1) if model.layout == "NHWC" else filled


def _classifier(model: Classifier) -> Any:
    get = getattr(model.module, "get_classifier", None)
    return None if get is None else get()


def _described(classifier: Any) -> str:
    if isinstance(classifier, (tuple, list)):
        return f"{len(classifier)} layers whose outputs are averaged"
    return "nothing of the kind" if classifier is None else type(classifier).__name__
