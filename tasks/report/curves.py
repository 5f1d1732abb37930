"""Mean curves of all metrics with their uncertainty, gathered shard by shard: memory does not grow with images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from storage.results import Results
from tasks.curve_kinds import place_of

# Curves of images with different numbers of parts have different steps; they meet on one grid.
GRID = np.linspace(0.0, 1.0, 101)

# Two-sided 95 % of the normal distribution.
Z95 = 1.96


@dataclass
class MeanCurve:
    """The mean of one method's curves over images, on ``GRID``, and the sums that it is made of.

    A curve says nothing before its first step and after its last: ``reached`` counts the images there.
    """

    method: str
    curve: str
    count: int = 0
    reached: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID), dtype=np.int64))
    total: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID)))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID)))

    def add(self, values: np.ndarray) -> None:
        """Takes in curves ``[n, len(GRID)]``, NaN where they do not reach."""
        self.count += len(values)
        self.reached += np.isfinite(values).sum(axis=0)
        self.total += np.nansum(values, axis=0)
        self.squares += np.nansum(values**2, axis=0)

    @property
    def covered(self) -> np.ndarray:
        """The points of the grid that the curves of all images reach: elsewhere the mean is another set's."""
        return self.reached == self.count

    @property
    def mean(self) -> np.ndarray:
        """Mean value at every point of the grid; NaN where it is not covered."""
        return np.where(self.covered, self.total, np.nan) / self.count

    @property
    def margin(self) -> np.ndarray:
        """Half the width of the 95 % interval of the mean, by the normal approximation; 0 for one image."""
        if self.count < 2:
            return np.zeros(len(GRID))
        variance = np.maximum(self.squares - self.count * self.mean**2, 0.0) / (self.count - 1)
        return Z95 * np.sqrt(variance / self.count)


def mean_curves(results: Results) -> list[MeanCurve]:
    """Mean curves of all methods of a run, kind by kind."""
    found: dict[tuple[str, str], MeanCurve] = {}
    for record, table in results.select("metrics").tables("curves"):
        columns = {name: table[name].to_numpy() for name in ("image_id", "fraction", "prob")}
        names = np.array(table["curve"].to_pylist(), dtype=object)
        method = record.unit.variant
        for name in dict.fromkeys(names.tolist()):
            rows = names == name
            mean = found.setdefault((method, name), MeanCurve(method, name))
            for values in _on_grid(*(column[rows] for column in columns.values())):
                mean.add(values)
    return sorted(found.values(), key=lambda one: (place_of(one.curve), one.curve))


def _on_grid(image_id: np.ndarray, fraction: np.ndarray, prob: np.ndarray) -> Iterator[np.ndarray]:
    """Curves on the grid, ``[n, len(GRID)]`` for every length of curve."""
    _, owner, points = np.unique(image_id, return_inverse=True, return_counts=True)
    order = np.lexsort((fraction, owner))
    fraction, prob, length = fraction[order], prob[order].astype(np.float64), points[owner[order]]
    for count in np.unique(points):
        rows = length == count
        yield _interpolate(fraction[rows].reshape(-1, count), prob[rows].reshape(-1, count))


def _interpolate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Straight lines between the points of curves ``x``, ``y`` ``[n, p]``; NaN beyond their ends."""
    before = (x[:, None, :] < GRID[:, None]).sum(axis=2)
    right = np.clip(before, min(1, x.shape[1] - 1), x.shape[1] - 1)
    left = np.maximum(right - 1, 0)
    x0, x1, y0, y1 = (np.take_along_axis(of, at, axis=1) for of in (x, y) for at in (left, right))
    share = np.clip((GRID - x0) / np.maximum(x1 - x0, 1e-12), 0.0, 1.0)
    # A share of pixels is rounded: a curve reaches the point of the grid that is nearest to its end.
    near = 0.5 / (len(GRID) - 1)
    first, last = x[:, :1] - near, x[:, -1:] + near
    inside = (first <= GRID) & (last >= GRID)
    return np.where(inside, y0 * (1.0 - share) + y1 * share, np.nan)
