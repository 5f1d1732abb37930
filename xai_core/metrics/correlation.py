"""Correlations of many pairs at once, along the last dimension, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pearson's correlation of ``a`` and ``b`` ``[..., n]`` along the last dimension: ``[...]`` float64.

    The shapes broadcast; where ``mask`` (bool) is false, an entry counts for nothing. NaN where there is none: a
    side is constant, or an entry that counts is not finite.
    """
    return _cosine(*_aligned(a, b, mask))


def spearman(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Spearman's correlation, as :func:`pearson`: that of the ranks, where equal values share their mean rank.

    NaN where a side is constant, or an entry that counts is NaN; infinite entries have ranks.
    """
    a, b, kept = _aligned(a, b, mask)
    return _cosine(ranks(a, kept), ranks(b, kept), kept)


def ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 of values ``[..., n]`` among those where ``mask`` is true, ties at their mean; NaN has none."""
    # What is masked lies above all else, so no rank below depends on it.
    ordered = torch.where(mask, values, torch.inf).contiguous()
    ascending = ordered.sort(dim=-1).values
    below = torch.searchsorted(ascending, ordered)
    up_to = torch.searchsorted(ascending, ordered, side="right")
    # A value of infinity ties with other ones, and not with what is masked.
    up_to = torch.minimum(up_to, mask.sum(dim=-1, keepdim=True))
    return torch.where(values.isnan(), torch.nan, 0.5 * (below + up_to + 1).double())


def _aligned(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones((), dtype=torch.bool, device=a.device) if mask is None else mask
    aligned = torch.broadcast_tensors(a.double(), b.double(), kept)
    return aligned[0], aligned[1], aligned[2]


def _cosine(a: Tensor, b: Tensor, kept: Tensor) -> Tensor:
    """The cosine between both sides' deviations from their means."""
    if not a.shape[-1]:
        return a.new_full(a.shape[:-1], torch.nan)
    return (_direction(a, kept) * _direction(b, kept)).sum(dim=-1).clamp(-1, 1)


def _direction(values: Tensor, kept: Tensor) -> Tensor:
    """Deviations from the mean, scaled to length 1, 0 where masked; NaN where they have no direction."""
    mean = torch.where(kept, values, 0.0).sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)
    deviation = torch.where(kept, values - mean, 0.0)
    # Squares of tiny or huge deviations would leave the floats.
    scaled = deviation / deviation.abs().amax(dim=-1, keepdim=True)
    unit = scaled / scaled.norm(dim=-1, keepdim=True)
    # The mean of equal numbers can be off by a rounding, which is no direction.
    highest = torch.where(kept, values, -torch.inf).amax(dim=-1, keepdim=True)
    lowest = torch.where(kept, values, torch.inf).amin(dim=-1, keepdim=True)
    return torch.where(highest > lowest, unit, torch.nan)
