"""Mean perturbation curves with their uncertainty, gathered shard by shard: memory does not grow with images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from storage.results import Results

# Curves of images with different numbers of parts have different steps; they meet on one grid.
GRID = np.linspace(0.0, 1.0, 101)

KINDS = ("insertion", "deletion", "part_insertion", "part_deletion")

# Two-sided 95 % of the normal distribution.
Z95 = 1.96


@dataclass
class MeanCurve:
    """The mean of one method's curves over images, on ``GRID``, and the sums that it is made of."""

    method: str
    curve: str
    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID)))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID)))

    def add(self, values: np.ndarray) -> None:
        """Takes in curves ``[n, len(GRID)]``."""
        self.count += len(values)
        self.total += values.sum(axis=0)
        self.squares += (values**2).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        """Mean probability at every point of the grid."""
        return self.total / self.count

    @property
    def margin(self) -> np.ndarray:
        """Half the width of the 95 % interval of the mean, by the normal approximation; 0 for one image."""
        if self.count < 2:
            return np.zeros(len(GRID))
        variance = np.maximum(self.squares - self.count * self.mean**2, 0.0) / (self.count - 1)
        return Z95 * np.sqrt(variance / self.count)


def mean_curves(results: Results) -> list[MeanCurve]:
    """Mean curves of all methods of a run, insertion first, part curves last."""
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
    return sorted(found.values(), key=lambda one: (_kind(one.curve), one.curve))


def _kind(curve: str) -> int:
    stem = curve.split("[")[0]
    return KINDS.index(stem) if stem in KINDS else len(KINDS)


def _on_grid(image_id: np.ndarray, fraction: np.ndarray, prob: np.ndarray) -> Iterator[np.ndarray]:
    """Curves on the grid, ``[n, len(GRID)]`` for every length of curve: those of one length share their steps."""
    _, owner, points = np.unique(image_id, return_inverse=True, return_counts=True)
    order = np.lexsort((fraction, owner))
    fraction, prob, length = fraction[order], prob[order].astype(np.float64), points[owner[order]]
    for count in np.unique(points):
        x = fraction[length == count].reshape(-1, count)[0]
        yield _interpolate(x, prob[length == count].reshape(-1, count))


def _interpolate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Straight lines between the points ``x`` ``[p]`` of all curves ``y`` ``[n, p]``."""
    right = np.clip(np.searchsorted(x, GRID), 1, len(x) - 1)
    width = np.maximum(x[right] - x[right - 1], 1e-12)
    share = np.clip((GRID - x[right - 1]) / width, 0.0, 1.0)
    return y[:, right - 1] * (1.0 - share) + y[:, right] * share
