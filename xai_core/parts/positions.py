"""From clusters of positions to labels of pixels, whatever the clustering."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xai_core.errors import UsageError
from xai_core.parts.parser import ParserInput


def cluster_positions(given: ParserInput, cluster: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Clusters the positions of each image on its own and enlarges the cluster map (KL-Hessian, section 4.1).

    Args:
        cluster: maps the unit vectors of one image, float64 ``[rows * columns, D]``, to labels.

    Returns:
        int64 ``[B, H, W]``.

    Raises:
        UsageError: fewer positions than parts asked for.
    """
    # scikit-learn's own dependency. Clustering a few hundred positions takes milliseconds on one thread and
    # many times that when two pools wake up for it; one thread also fixes the order of summation.
    from threadpoolctl import threadpool_limits

    if given.features is None:
        raise TypeError("a parser that reads features must be registered with needs=('features',)")
    images, rows, columns, width = given.features.shape
    if given.k > rows * columns:
        raise UsageError(
            f"parts.k: expected at most {rows * columns}, the positions of a {rows} x {columns} feature map, "
            f"got {given.k}; ask for fewer parts or name a parts.backbone with a finer grid"
        )
    # float64: what the batch leaves in the last bits of a float32 must not decide between two clusters.
    vectors = given.features.astype(np.float64).reshape(images, rows * columns, width)
    with threadpool_limits(1):
        return np.stack([enlarge(cluster(one).reshape(rows, columns), given.size) for one in vectors])


def enlarge(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A cluster map at image resolution: the label whose bilinearly enlarged indicator is the largest.

    Nearest neighbour would draw the same parts with stairs for borders, and a lone position of a
    14 x 14 map (1/196 of the image) would just escape the default area threshold of 1/200.

    Args:
        labels: integers ``[rows, columns]``.
        size: height and width.

    Returns:
        int64 ``[H, W]``; ties go to the smaller label.
    """
    values, inverse = np.unique(labels, return_inverse=True)
    indicators = np.eye(len(values), dtype=np.float32)[inverse.reshape(labels.shape)]
    down, across = _bilinear(labels.shape[0], size[0]), _bilinear(labels.shape[1], size[1])
    # Rounded, so that a tie is a tie in spite of the order of summation.
    enlarged = np.einsum("yr,rcv,xc->yxv", down, indicators, across, optimize=True).round(5)
    return values[enlarged.argmax(axis=-1)].astype(np.int64)


def _bilinear(cells: int, pixels: int) -> np.ndarray:
    """Weights ``[pixels, cells]`` of linear interpolation between cell centres, constant beyond them."""
    place = ((np.arange(pixels) + 0.5) * cells / pixels - 0.5).clip(0, cells - 1)
    return (1 - np.abs(place[:, None] - np.arange(cells))).clip(0).astype(np.float32)
