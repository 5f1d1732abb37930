"""Instance-specific effective receptive fields: where in the image a scalar inside a network comes from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.precision import own_modes
from xai_core.receptive_fields.attributors import choose
from xai_core.receptive_fields.passes import Reading, rows_of
from xai_core.receptive_fields.scalars import Scalars


def receptive_fields(
    model: Classifier,
    images: Tensor,
    scalars: Scalars,
    *,
    attributor: str = "auto",
    options: Any = None,
    batch_size: int = 32,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Instance-specific effective receptive fields of N scalars (iERF, equations 1, 2 and 10).

    Scalars of one image share forward passes; nothing behind the scalars' layer runs.

    Args:
        images: normalised inputs ``[B, 3, H, W]``.
        scalars: what is explained, such as :func:`~xai_core.receptive_fields.feature_vectors` or
            :func:`~xai_core.receptive_fields.latents`; their ``owner`` numbers the images.
        attributor: a name of the registry ``attributors``, or ``auto``: ``srd`` on maps, ``attn_lrp`` on ViTs.
        options: the attributor's options object, or a dict of them; defaults where None.
        batch_size: the most images in one pass, fewer where these do not fit in memory; it never changes a result.
        size: rows and columns to which a map is averaged; None leaves the attributor's own resolution.

    Returns:
        ``[N, h, w]`` float32 on the images' device, higher is more evidence.

    Raises:
        UsageError: an unknown attributor or one that does not fit the model; a layer that does not run or has no
            spatial positions; owners outside the batch; shapes that do not fit.
        NotFinite: an image holds NaN or infinity.
        OutOfMemory: one image does not fit in memory even alone.
    """
    entry, chosen = choose(model, attributor, options)
    _check(model, images, scalars, batch_size, size)
    with own_modes("fp32", images.device):
        images = images.clone() if images.is_inference() else images.detach()
        table = rows_of(scalars.owner)

        def explain(rows: slice) -> tuple[Tensor, Tensor]:
            some = table[rows]
            # The fullest row comes first: behind its last scalar there is nothing in the others either.
            some = some[:, : int((some[0] >= 0).sum())]
            of_rows = images[scalars.owner[some[:, 0].to(scalars.owner.device)].to(images.device)]
            reading = Reading(model, of_rows, scalars, some)
            fields = [_shrunk(one.float(), size) for one in entry.function(reading, chosen, batch_size)]
            return torch.cat(reading.all_columns()), torch.cat(fields)

        found = run_batches(explain, len(table), batch_size)
    if not found:
        return images.new_zeros(0, *(images.shape[-2:] if size is None else size), dtype=torch.float32)
    which = torch.cat([numbers for numbers, _ in found])
    return torch.cat([fields for _, fields in found])[which.argsort().to(images.device)]


def _shrunk(fields: Tensor, size: tuple[int, int] | None) -> Tensor:
    return fields if size is None else F.adaptive_avg_pool2d(fields.unsqueeze(1), size).squeeze(1)


def _check(
    model: Classifier, images: Tensor, scalars: Scalars, batch_size: int, size: tuple[int, int] | None
) -> None:
    """Refuses what cannot be explained, before any pass."""
    model.layer(scalars.layer)
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images: expected [B, 3, H, W], got {tuple(images.shape)}")
    owner = scalars.owner
    if owner.ndim != 1 or (len(owner) and not (int(owner.min()) >= 0 and int(owner.max()) < len(images))):
        raise UsageError(
            f"owner: expected numbers in 0..{len(images) - 1}, one a scalar, got shape {tuple(owner.shape)}"
            + (f" from {int(owner.min())} to {int(owner.max())}" if owner.numel() else "")
        )
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UsageError(f"size: expected rows and columns of at least 1, got {size}; None leaves the resolution")
    used = owner.unique().to(images.device)
    bad = used[~images[used].isfinite().flatten(1).all(dim=1)].tolist()
    if bad:
        raise NotFinite(f"receptive fields: expected finite inputs, got NaN or infinity in image {bad[0]}")
