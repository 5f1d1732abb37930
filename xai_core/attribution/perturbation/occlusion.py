"""Occlusion: how much a class loses while a window hides part of the image (Zeiler & Fergus 2014, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xai_core.attribution.perturbation.masking import (
    ScoringOptions,
    behind_the_mask,
    clean_scores,
    masked_pictures,
    read_scores,
)
from xai_core.batching import run_batches
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class OcclusionOptions(ScoringOptions):
    """Options of occlusion, in pixels.

    ``window``: side of the square window, by default a seventh of the shorter side of the input (32 at 224);
    ``stride``: by default half a window. The paper names no numbers.
    """

    method: ClassVar[str] = "occlusion"

    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride"):
            value = getattr(self, name)
            self.expect(value is None or value >= 1, name, "at least 1 pixel")
        if self.window is not None:
            self.expect(
                self.stride is None or self.stride <= self.window,
                "stride",
                f"at most the window's {self.window} pixels, so that no pixel is left out",
            )

    def pixels(self, height: int, width: int) -> tuple[int, int]:
        """Window and stride on an input of that size."""
        window = self.window or max(1, round(min(height, width) / 7))
        return window, self.stride or max(1, window // 2)


def window_fits(model: Classifier, options: Any) -> str | None:
    """A window no larger than the input, moved by no more than its own side."""
    height, width = model.input_size
    window, stride = options.pixels(height, width)
    if window > min(height, width):
        return f"its input is {height} x {width} pixels, smaller than the window of {window}"
    return None if stride <= window else f"a stride of {stride} pixels skips some behind a window of {window}"


@methods.register(
    "occlusion",
    options=OcclusionOptions,
    paper="Zeiler & Fergus 2014, Visualizing and Understanding Convolutional Networks",
    equation="section 4.2",
    needs=(window_fits,),
    cost="windows + 1 forwards (170 at 224 x 224)",
    gradient_free=True,
)
def occlusion(
    model: Classifier, images: Tensor, classes: Tensor, options: OcclusionOptions, batch_size: int
) -> Tensor:
    """Occlusion: the class's mean loss over the positions of a sliding window that hide a pixel."""
    height, width = images.shape[-2:]
    window, stride = options.pixels(height, width)
    rows = covered(height, window, stride).to(images.device)
    columns = covered(width, window, stride).to(images.device)
    behind = behind_the_mask(model, images, options)

    def outside(position: Tensor) -> Tensor:
        down, across = position // len(columns), position % len(columns)
        return ~(rows[down].unsqueeze(2) & columns[across].unsqueeze(1)).unsqueeze(1)

    def hidden(pairs: slice) -> Tensor:
        pictures, image = masked_pictures(pairs, images, behind, outside)
        return read_scores(model, pictures, classes[image], options.scalar)

    clean = clean_scores(model, images, classes, options.scalar, batch_size)
    positions = len(rows) * len(columns)
    scores = torch.cat(run_batches(hidden, positions * len(images), batch_size))
    drops = clean - scores.unflatten(0, (len(rows), len(columns), len(images)))
    return covering_mean(drops, rows, columns)


def covered(size: int, window: int, stride: int) -> Tensor:
    """Which pixels of a line each position of the window hides, ``[positions, size]`` bool.

    Positions are ``stride`` apart from 0 until the end is reached; the last window is cut off at the border.
    """
    positions = -(-max(0, size - window) // stride) + 1
    first = torch.arange(positions).unsqueeze(1) * stride
    pixel = torch.arange(size)
    return (pixel >= first) & (pixel < first + window)


def covering_mean(drops: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each pixel's mean over the windows that hide it.

    Args:
        drops: ``[R, C, B, K]``; rows: ``[R, H]`` and columns: ``[C, W]``, as :func:`covered` gives them.

    Returns:
        ``[B, K, H, W]``.
    """
    vertical, horizontal = rows.to(drops.dtype), columns.to(drops.dtype)
    total = torch.einsum("rcbk,rh,cw->bkhw", drops, vertical, horizontal)
    return total / (vertical.sum(dim=0).unsqueeze(1) * horizontal.sum(dim=0))
