"""Gradients of class scores with respect to the last block's attention, averaged along a path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xai_core.attention import blocks_of, probed
from xai_core.attribution.attention.flow import wide
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier


def integrated_feedback(
    model: Classifier, images: Tensor, classes: Tensor, rows: Tensor, steps: int, batch_size: int
) -> Tensor:
    """The mean over heads of the positive part of the mean gradient along the path ``a * images``, a from 0 to 1.

    Path pictures of all images form one list, cut to ``batch_size``; sums are taken class by class.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, K]``; rows: positions of the reading tokens ``[n]``.
        steps: pictures of the path, both ends among them.

    Returns:
        ``[B, K, n, T]``.
    """
    last = len(blocks_of(model)) - 1
    path = torch.linspace(0, 1, steps, device=images.device, dtype=images.dtype)
    totals: list[Tensor] = []

    def add(pairs: slice) -> None:
        pair = torch.arange(pairs.start, pairs.stop, device=images.device)
        image = pair // steps
        first, count = int(image[0]), int(image[-1] - image[0]) + 1
        with torch.enable_grad(), probed(model, ["attention"], with_gradient=True, first=last) as found:
            logits = model(images[image] * path[pair % steps].view(-1, 1, 1, 1))

        def by_image(gradients: Sequence[Tensor]) -> Tensor:
            read = wide(gradients[0][:, :, rows])
            return read.new_zeros(count, *read.shape[1:]).index_add_(0, image - first, read)

        sums = per_class(logits, classes[image], found["attention"], by_image)
        if not totals:
            totals.append(sums.new_zeros(len(images), *sums.shape[1:]))
        # Last of all: a batch that ran out of memory before is run again in halves, and must not count twice.
        totals[0][first : first + count] += sums

    run_batches(add, len(images) * steps, batch_size)
    return (totals[0] / steps).relu_().mean(dim=2)


def check_steps(method: str, steps: int) -> None:
    """Refuses a path without both its ends.

    Raises:
        UsageError: naming the option.
    """
    if steps < 2:
        raise UsageError(f"{method}.steps: expected at least 2, got {steps}")
