"""Baselines: what replaces a removed pixel. Each is computed once, from the clean image, and has a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.models import Classifier

BaselineKind = Literal["blur", "black", "mean", "noise"]


@dataclass(frozen=True)
class Baseline:
    """A named baseline: ``blur`` of ``sigma`` pixels, ``black``, ``mean`` (normalised 0) or seeded ``noise``."""

    kind: BaselineKind = "blur"
    sigma: float = 11.0
    seed: int = 0

    def __str__(self) -> str:
        return {"blur": f"blur(sigma={self.sigma:g})", "noise": f"noise(seed={self.seed})"}.get(
            self.kind, self.kind
        )


def make_baseline(baseline: Baseline, model: Classifier, images: Tensor) -> Tensor:
    """The baseline of each image, shaped as the images ``[B, 3, H, W]``, in the model's input space."""
    return MAKERS[baseline.kind](baseline, model, images)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, kernel cut at 4 sigma (or the image's size), borders reflected.

    Args:
        images: ``[B, C, H, W]``; sigma: pixels.
    """
    for axis in (2, 3):
        images = _blur_axis(images, sigma, axis)
    return images


def _blur_axis(images: Tensor, sigma: float, axis: int) -> Tensor:
    radius = min(int(4 * sigma + 0.5), images.shape[axis] - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype)
    shape, padding = (
        ((1, 1, -1, 1), (0, 0, radius, radius)) if axis == 2 else ((1, 1, 1, -1), (radius, radius, 0, 0))
    )
    flat = images.flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.pad(flat, padding, mode="reflect"), kernel.view(shape)).view(images.shape)


def _noise(baseline: Baseline, model: Classifier, images: Tensor) -> Tensor:
    """The same uniform picture for every image, so that a batch's make-up changes nothing."""
    generator = torch.Generator().manual_seed(baseline.seed)
    picture = torch.rand(images.shape[1:], generator=generator).to(images)
    return model.normalise(picture.unsqueeze(0)).expand_as(images)


MAKERS: dict[str, Callable[[Baseline, Classifier, Tensor], Tensor]] = {
    "blur": lambda baseline, model, images: gaussian_blur(images, baseline.sigma),
    "black": lambda baseline, model, images: model.normalise(torch.zeros_like(images[:1])).expand_as(images),
    "mean": lambda baseline, model, images: torch.zeros_like(images),
    "noise": _noise,
}
