"""Means with 95 % bootstrap intervals, for many columns of the same images at once."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95

# Numbers drawn at once: resamples of a large data set come in portions instead of filling the memory.
DRAWN_AT_ONCE = 4_000_000


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
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(axis=0) / count
    low, high = np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    enough = count >= 2
    if enough.any():
        drawn = _resampled_means(filled[:, enough], known[:, enough].astype(np.float64), resamples, seed)
        tail = 50.0 * (1.0 - COVERAGE)
        low[enough], high[enough] = np.nanpercentile(drawn, [tail, 100.0 - tail], axis=0)
    return mean, low, high


def _resampled_means(values: np.ndarray, known: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of every resample ``[resamples, C]``; how often each image was drawn is a matrix product's weight."""
    generator = np.random.default_rng(seed)
    images = len(values)
    portion = max(1, DRAWN_AT_ONCE // images)
    means = []
    for first in range(0, resamples, portion):
        size = min(portion, resamples - first)
        drawn = generator.integers(images, size=(size, images))
        weights = np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((weights @ values) / (weights @ known))
    return np.concatenate(means)
