"""Scalars of a layer read off images: an image is run up to the layer, once for its scalars of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.concepts.vectors import prefix, to_vectors
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.receptive_fields.passes import output_of
from xai_core.receptive_fields.scalars import Scalars, settled


def by_image(
    model: Classifier,
    images: Tensor,
    owner: Tensor,
    layer: str,
    function: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """What a function makes of the layer's output for each scalar's image, in the order of the scalars.

    Args:
        owner: ``[N]``, the image of each scalar; function: ``(output [n, ...], which [n]) -> [n, ...]`` of the
            scalars ``which``, each with its own image's output.
    """
    owner = owner.to(images.device)
    order = owner.argsort(stable=True)

    def some(rows: slice) -> Tensor:
        which = order[rows]
        needed, place = owner[which].unique(return_inverse=True)
        return function(output_of(model, images[needed], layer)[place], which)

    return torch.cat(run_batches(some, len(order), batch_size))[order.argsort()]


def settle(model: Classifier, images: Tensor, scalars: Scalars, batch_size: int) -> tuple[Scalars, Tensor]:
    """Scalars with all fixed that the clean images decide, and their values ``[N]`` on these.

    A maximum stays at the position that has it on the clean image.
    """
    fixed = scalars

    def fix(output: Tensor, which: Tensor) -> Tensor:
        nonlocal fixed
        vectors = to_vectors(model, output, scalars.layer)
        fixed = settled(fixed, vectors, which, prefix(model, output))
        return fixed(vectors, which)

    clean = by_image(model, images, scalars.owner, scalars.layer, fix, batch_size)
    return fixed, clean


def values(model: Classifier, images: Tensor, owner: Tensor, scalars: Scalars, batch_size: int) -> Tensor:
    """All N scalars, each read from the image that ``owner`` ``[N]`` gives it, ``[N]``."""

    def read(output: Tensor, which: Tensor) -> Tensor:
        return scalars(to_vectors(model, output, scalars.layer), which)

    return by_image(model, images, owner, scalars.layer, read, batch_size)


def check_owner(images: Tensor, owner: Tensor) -> None:
    """Refuses images and owners that do not fit.

    Raises:
        UsageError: images that are not ``[B, 3, H, W]``, no owner at all, or one outside 0..B - 1.
    """
    if images.ndim != 4 or owner.ndim != 1 or not len(owner) or owner.is_floating_point():
        raise UsageError(
            "expected images [B, 3, H, W] and at least one owner [N] of whole numbers, got "
            f"{tuple(images.shape)} and {owner.dtype} of shape {tuple(owner.shape)}"
        )
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise UsageError(f"owner: expected 0..{len(images) - 1}, got {int(owner.min())}..{int(owner.max())}")
