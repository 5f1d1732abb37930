"""A uniform grid: parts that know nothing of the image."""

from __future__ import annotations

import numpy as np

from xai_core.errors import UsageError
from xai_core.parts.parser import ParserInput
from xai_core.registry import parsers


@parsers.register("grid", paper="KL-Hessian, section 5 (8 x 8 uniform grid)")
def grid(given: ParserInput, options: object) -> np.ndarray:
    """A uniform grid of exactly k cells, as square as k's divisors allow (KL-Hessian, section 5)."""
    height, width = given.size
    rows, columns = grid_shape(given.k, height, width)
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return np.broadcast_to(row[:, None] * columns + column, (len(given.images), height, width))


def grid_shape(k: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns with rows * columns = k and the squarest cells; the flatter grid where two tie.

    Raises:
        UsageError: no such grid has cells of at least one pixel.
    """
    shapes = [(rows, k // rows) for rows in range(1, k + 1) if k % rows == 0]
    fitting = [(rows, columns) for rows, columns in shapes if rows <= height and columns <= width]
    if not fitting:
        raise UsageError(
            f"parts.k: expected a number of cells that divides into rows and columns of a {height} x {width} "
            f"image, got {k}; choose another, such as a square number"
        )
    return min(fitting, key=lambda shape: _elongation(height / shape[0], width / shape[1]))


def _elongation(first: float, second: float) -> float:
    return max(first, second) / min(first, second)
