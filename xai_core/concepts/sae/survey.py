"""The first pass over the vectors: how many there are, how large, around which centre, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_core.concepts.dictionary import OVERCOMPLETENESS
from xai_core.concepts.streams import BLOCK_VECTORS, Reader
from xai_core.errors import UsageError

MEDIAN_VECTORS = 4096
_MEDIAN_ITERATIONS = 200
_STILL = 1e-7


@dataclass(frozen=True)
class Survey:
    """What one pass finds.

    ``vectors`` besides ``zero_vectors`` of zeros; their ``mean_norm`` and ``mean`` ``[C]`` (float64); ``sample``
    ``[M, C]``, drawn without replacement, in random order: of any M the first are as good.
    """

    vectors: int
    zero_vectors: int
    mean_norm: float
    mean: Tensor
    sample: Tensor

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)


def survey(chunks: Iterable[Tensor], *, atoms: int | None, seed: int) -> Survey:
    """One pass over vectors ``[n, C]`` in memory that does not grow with them.

    Every vector draws a number; those with the smallest numbers are the sample. Neither that nor the sums depend
    on how the vectors are cut into chunks.

    Args:
        atoms: how many vectors the sample has to hold at least (None: 8 C).

    Raises:
        UsageError: vectors of two widths, not finite, or fewer than two besides zeros.
    """
    numbers = np.random.default_rng(seed)
    reader = Reader(chunks)
    count, norms, total = 0, 0.0, torch.zeros(0, dtype=torch.float64)
    keys, sample = torch.zeros(0, dtype=torch.float64), torch.zeros(0)
    while (block := reader.take(BLOCK_VECTORS)) is not None:
        if not count:
            total = total.new_zeros(block.shape[1], device=block.device)
            sample = block[:0]
        _refuse_bad(block, count)
        precise = block.double()
        count += len(block)
        norms += float(precise.norm(dim=1).sum())
        total = total + precise.sum(dim=0)
        keys, sample = _smallest(
            torch.cat([keys, torch.from_numpy(numbers.random(len(block)))]),
            torch.cat([sample, block]),
            max(MEDIAN_VECTORS, OVERCOMPLETENESS * block.shape[1] if atoms is None else atoms),
        )
    if count < 2:
        raise UsageError(
            f"vectors: expected at least 2 that are not all zero, got {count} of {count + reader.zero_vectors}; "
            "sample more images, or a layer whose positions are active"
        )
    return Survey(count, reader.zero_vectors, norms / count, total / count, sample)


def geometric_median(points: Tensor) -> Tensor:
    """The point ``[C]`` of the least sum of distances to points ``[M, C]``: Weiszfeld's iteration, in float64."""
    points = points.double()
    median = points.mean(dim=0)
    size = points.norm(dim=1).mean()
    for _ in range(_MEDIAN_ITERATIONS):
        weights = 1 / (points - median).norm(dim=1).clamp_min(_STILL * size)
        moved = weights @ points / weights.sum()
        step, median = (moved - median).norm(), moved
        if step <= _STILL * size:
            break
    return median


def _smallest(keys: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The vectors with the smallest keys, in the order of these."""
    order = keys.argsort()[:count]
    return keys[order], vectors[order.to(vectors.device)]


def _refuse_bad(block: Tensor, before: int) -> None:
    bad = int((~block.isfinite()).any(dim=1).sum())
    if bad:
        raise UsageError(
            f"vectors: expected finite numbers, got NaN or infinity in {bad} of the {len(block)} after the first "
            f"{before}; leave out the images that they come from"
        )
