"""Structural similarity of maps (Wang et al. 2004), by scikit-image's definition and over whole batches."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.errors import UsageError

#: Side of the sliding window in pixels.
WINDOW = 7
# The paper's K1 = 0.01 and K2 = 0.03, squared, for values that span a range of 1.
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of two maps of each image (Wang et al. 2004, eq. 13), at most 1, which only equal maps reach.

    It is ``skimage.metrics.structural_similarity`` with ``data_range=1`` and its other defaults: uniform 7 x 7
    windows, sample covariances, and the mean over the windows that lie inside the map.

    Args:
        a, b: ``[B, H, W]`` of values in [0, 1], as :func:`unit_range` gives them.

    Returns:
        ``[B]`` float64.

    Raises:
        UsageError: maps of different shapes, or smaller than the window.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < WINDOW:
        raise UsageError(
            f"structural_similarity: expected two maps [B, H, W] of at least {WINDOW} x {WINDOW}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double(), b.double()
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    variance_a = sample * (_window_mean(a * a) - mean_a * mean_a)
    variance_b = sample * (_window_mean(b * b) - mean_b * mean_b)
    covariance = sample * (_window_mean(a * b) - mean_a * mean_b)
    likeness = (2 * mean_a * mean_b + _LUMINANCE) * (2 * covariance + _CONTRAST)
    scale = (mean_a**2 + mean_b**2 + _LUMINANCE) * (variance_a + variance_b + _CONTRAST)
    return (likeness / scale).flatten(1).mean(dim=1)


def unit_range(maps: Tensor) -> Tensor:
    """Maps ``[B, H, W]`` shifted and scaled so that each spans [0, 1], float64; a constant map becomes 0."""
    maps = maps.double()
    lowest = maps.amin(dim=(1, 2), keepdim=True)
    width = maps.amax(dim=(1, 2), keepdim=True) - lowest
    return (maps - lowest) / width.masked_fill(width == 0, 1.0)


def _window_mean(values: Tensor) -> Tensor:
    return F.avg_pool2d(values.unsqueeze(1), WINDOW, stride=1).squeeze(1)
