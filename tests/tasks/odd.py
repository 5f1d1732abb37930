"""A model and methods that stumble over marked pictures, each mark in a place of its own in the chain.

A picture's marks are whole colour channels: a real study meets such pictures one by one and by surprise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.memory import Meal
from xai_core.attribution import PartScores
from xai_core.models import Classifier
from xai_core.registry import NoOptions, methods

__all__: list[str] = []

SIZE = 64
FULL, NONE = 255, 0

# Channel and value of a mark, and what it does.
MARKS = {
    "nan_logits": (0, FULL),
    "nan_gradient": (1, FULL),
    "nan_when_perturbed": (2, FULL),
    "nan_map": (0, NONE),
    "nan_part": (1, NONE),
    "too_large": (2, NONE),
}

default_cfgs = generate_default_cfgs(
    {
        "odd_vit": {
            "num_classes": 3,
            "input_size": (3, SIZE, SIZE),
            "interpolation": "nearest",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "fixed_input_size": True,
        }
    }
)


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN for some images."""

    @staticmethod
    def forward(context: Any, values: Tensor, images: Tensor) -> Tensor:
        context.save_for_backward(images)
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (images,) = context.saved_tensors
        return torch.where(images.view(-1, 1, 1), torch.nan, gradient), None


class OddVit(VisionTransformer):
    """A small transformer with the marks' troubles; ``fits`` images have room in memory (0: any number)."""

    def __init__(self, *, fits: int = 0, **named: Any) -> None:
        super().__init__(**named)
        self.meal = Meal(fits) if fits else None

    def forward_features(self, images: Tensor, *rest: Any, **named: Any) -> Tensor:
        if self.meal is not None:
            self.meal.take(len(images))
        steep = share(images, "nan_gradient") > 0.9
        hook = self.blocks[1].register_forward_pre_hook(
            lambda _block, given: (NanGradient.apply(given[0], steep),)
        )
        try:
            features = super().forward_features(images, *rest, **named)
        finally:
            hook.remove()
        half = share(images, "nan_when_perturbed")
        bad = (share(images, "nan_logits") > 0.9) | ((half > 0.1) & (half < 0.9))
        return torch.where(bad.view(-1, 1, 1), torch.nan, features)


@register_model
def odd_vit(pretrained: bool = False, **named: Any) -> OddVit:
    """Two blocks over 64 patches."""
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    named.pop("out_indices", None)
    return build_model_with_cfg(OddVit, "odd_vit", pretrained, **{**shape, **named})


def share(images: Tensor, mark: str) -> Tensor:
    """How much of each normalised image carries a mark, ``[B]`` in [0, 1]."""
    channel, value = MARKS[mark]
    values = images[:, channel].detach() * 0.5 + 0.5
    return ((values - value / 255).abs() < 0.02).flatten(1).float().mean(dim=1)


def odd_map(model: Classifier, images: Tensor, targets: Tensor, options: object, batch_size: int) -> Tensor:
    """A map that is NaN in one pixel of some images, and that takes too much memory for others."""
    if (share(images, "too_large") > 0.9).any():
        Meal(fits=0).take(1)
    maps = images.mean(dim=1)
    maps[share(images, "nan_map") > 0.9, 3, 5] = torch.nan
    return maps


def odd_parts(
    model: Classifier, images: Tensor, targets: Tensor, parts: Tensor, options: object, batch_size: int
) -> PartScores:
    """Part scores of which the second is infinite for some images."""
    scores = torch.arange(4.0).repeat(len(images), 1) + images.mean(dim=(1, 2, 3)).view(-1, 1)
    scores[share(images, "nan_part") > 0.9, 1] = torch.inf
    return PartScores(scores)


@contextmanager
def odd_methods() -> Iterator[None]:
    """Registers the two methods for the block."""
    entries = methods._entries
    methods.register("odd_map", options=NoOptions)(odd_map)
    methods.register("odd_parts", options=NoOptions, output="parts")(odd_parts)
    try:
        yield
    finally:
        del entries["odd_map"], entries["odd_parts"]


def write_picture(path: Path, seed: int, *marks: str) -> None:
    """A picture of coarse noise with every channel between 40 and 200, and some marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(40, 200, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(cells).resize((SIZE, SIZE), Image.Resampling.NEAREST)).copy()
    for mark in marks:
        channel, value = MARKS[mark]
        pixels[..., channel] = value
    Image.fromarray(pixels).save(path)
