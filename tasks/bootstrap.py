"""Means, and differences of means, with 95 % bootstrap intervals over the same resamples of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95

# Numbers held at once: what is drawn of a large data set, or of many pairs, comes in portions.
HELD_AT_ONCE = 4_000_000


def bootstrap_means(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column means with percentile bootstrap intervals (Efron 1979).

    Images are drawn once for all columns, so that columns stay comparable: an easy image is easy for all.

    Args:
        values: ``[n, C]``, NaN where a value is undefined; undefined values take no part in a mean.

    Returns:
        mean, low, high ``[C]``: the mean is NaN without a value, low and high with fewer than two.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    weight = known.astype(np.float64)

    def means(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ filled) / (weights @ weight)

    mean = means(np.ones((1, len(values))))[0]
    low, high = _intervals(_resampled(len(values), means, resamples, seed), known.sum(axis=0))
    return mean, low, high


@dataclass(frozen=True)
class PairedMeans:
    """Mean differences between the columns of one block, every pair once: all ``[P]``.

    ``first`` and ``second`` are the pair's columns, ``count`` the rows on which both have a value. ``mean`` of
    first minus second is NaN without such a row, ``low`` and ``high`` with fewer than two.
    """

    first: np.ndarray
    second: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_differences(
    blocks: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[PairedMeans]:
    """Mean paired differences between all columns of every block, with percentile bootstrap intervals.

    The rows are the same images in all blocks and are drawn as in :func:`bootstrap_means`. Memory grows with
    images times columns, not with images times pairs.

    Args:
        blocks: ``[n, C]`` each, NaN where a value is undefined; C may differ.
    """
    for group in _portions(blocks, resamples):
        pairs = [_Pairs(block) for block in group]
        widths = np.cumsum([len(one.first) for one in pairs])[:-1]

        def differences(weights: np.ndarray, pairs: list[_Pairs] = pairs) -> np.ndarray:
            return np.concatenate([one.means(weights)[0] for one in pairs], axis=1)

        drawn = np.split(_resampled(len(group[0]), differences, resamples, seed), widths, axis=1)
        for one, resampled in zip(pairs, drawn, strict=True):
            mean, count = one.means(np.ones((1, len(group[0]))))
            low, high = _intervals(resampled, count[0])
            yield PairedMeans(one.first, one.second, count[0].astype(int), mean[0], low, high)


class _Pairs:
    """The pairs of a block's columns; columns that are defined on the same rows share their sums."""

    def __init__(self, values: np.ndarray) -> None:
        known = ~np.isnan(values)
        self.first, self.second = np.triu_indices(values.shape[1], 1)
        self.gaps, gaps_of = np.unique(known, axis=1, return_inverse=True)
        self.gaps_of = gaps_of.reshape(-1)
        self.summed = np.concatenate([np.where(known, values, 0.0), self.gaps], axis=1)

    def means(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean differences and the weight behind each, both ``[r, P]``, of weights ``[r, n]``."""
        found = np.stack([weights @ (self.summed * where[:, None]) for where in self.gaps.T])
        sums, counts = np.split(found, [len(self.gaps_of)], axis=2)
        gaps_of_first, gaps_of_second = self.gaps_of[self.first], self.gaps_of[self.second]
        # Each column is summed where the other one has a value too.
        gap = sums[gaps_of_second, :, self.first] - sums[gaps_of_first, :, self.second]
        count = counts[gaps_of_first, :, gaps_of_second]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (gap / count).T, count.T


def _portions(blocks: Sequence[np.ndarray], resamples: int) -> Iterator[list[np.ndarray]]:
    """The blocks in groups whose resampled differences fit into memory together."""
    group: list[np.ndarray] = []
    held = 0
    for block in blocks:
        size = resamples * block.shape[1] * (block.shape[1] - 1) // 2
        if group and held + size > HELD_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(block)
        held += size
    if group:
        yield group


def _resampled(
    images: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> np.ndarray:
    """A statistic of every resample ``[resamples, ...]``, given how often each image was drawn ``[r, images]``."""
    generator = np.random.default_rng(seed)
    portion = max(1, HELD_AT_ONCE // max(1, images))
    found = []
    for first in range(0, resamples, portion):
        drawn = generator.integers(images, size=(min(portion, resamples - first), images))
        found.append(statistic(np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float64)))
    return np.concatenate(found)


def _intervals(drawn: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of columns ``[resamples, C]``; NaN where fewer than two values stand behind one."""
    low, high = np.full(count.shape, np.nan), np.full(count.shape, np.nan)
    tail = 50.0 * (1.0 - COVERAGE)
    enough = count >= 2
    # A resample may miss every value of a column with few: only such columns pay for the slow function.
    missed = np.isnan(drawn).any(axis=0)
    for chosen, percentile in ((enough & ~missed, np.percentile), (enough & missed, np.nanpercentile)):
        if chosen.any():
            low[chosen], high[chosen] = percentile(drawn[:, chosen], [tail, 100.0 - tail], axis=0)
    return low, high
