"""Rivals compared on the same images: mean areas with intervals, and how far the best one is ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.bootstrap import bootstrap_differences, bootstrap_means


@dataclass(frozen=True)
class Measure:
    """A column of numbers: what it is called, and which direction is better (None: neither)."""

    column: str
    title: str
    higher_is_better: bool | None

    @property
    def arrow(self) -> str:
        """As the leaderboard shows it."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


@dataclass(frozen=True)
class AreaCell:
    """A mean with its 95 % bootstrap interval over ``count`` images; all three as places on a bar in percent."""

    mean: float | None
    low: float | None
    high: float | None
    count: int
    best: bool
    places: tuple[float, ...]


@dataclass(frozen=True)
class AreaTable:
    """Rivals (attribution methods, attributors) against measures; ``verdicts`` say how far the best leads."""

    title: str
    measures: tuple[Measure, ...]
    rows: tuple[tuple[str, tuple[AreaCell, ...]], ...]
    verdicts: tuple[str, ...]


def area_tables(
    rows: pa.Table,
    rival: str,
    measures: Sequence[Measure],
    group: Sequence[str],
    title: Callable[[Mapping[str, str]], str],
) -> list[AreaTable]:
    """A table for every group of rows (say a pair of layers), its rivals compared on the same images.

    What one image has several values of (targets, latents) is averaged first: such values are not independent,
    so images are what is resampled. Undefined values take no part.

    Args:
        rival: the column that names who is compared; measures: columns of numbers; group: the columns that
            tables differ in; title: a table's title from their values.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        groups.setdefault(tuple(row[name] for name in group), []).append(row)
    return [
        _area_table(title(dict(zip(group, values, strict=True))), members, rival, measures)
        for values, members in groups.items()
    ]


def _area_table(title: str, rows: list[dict[str, Any]], rival: str, measures: Sequence[Measure]) -> AreaTable:
    names = list(dict.fromkeys(row[rival] for row in rows))
    columns, verdicts = [], []
    for measure in measures:
        block = _by_image(rows, rival, measure.column, names)
        cells = _cells(block, measure)
        columns.append(cells)
        verdicts.append(_verdict(block, names, cells, measure))
    table = tuple((name, tuple(column[at] for column in columns)) for at, name in enumerate(names))
    return AreaTable(title, tuple(measures), table, tuple(one for one in verdicts if one))


def _by_image(rows: list[dict[str, Any]], rival: str, column: str, names: Sequence[str]) -> np.ndarray:
    """Means by image and rival ``[images, rivals]``, NaN where an image has no defined value."""
    images = {image: at for at, image in enumerate(sorted({row["image_id"] for row in rows}))}
    place = {name: at for at, name in enumerate(names)}
    values = np.array([np.nan if row[column] is None else row[column] for row in rows], np.float64)
    flat = np.array([images[row["image_id"]] * len(names) + place[row[rival]] for row in rows])
    known = np.isfinite(values)
    size = len(images) * len(names)
    sums = np.bincount(flat[known], values[known], minlength=size)
    counts = np.bincount(flat[known], minlength=size)
    with np.errstate(invalid="ignore"):
        return np.asarray((sums / counts).reshape(len(images), len(names)))


def _cells(block: np.ndarray, measure: Measure) -> list[AreaCell]:
    bounds = np.stack(bootstrap_means(block)[:3], axis=1)
    mean, counts = bounds[:, 0], np.isfinite(block).sum(axis=0)
    best = np.zeros(len(mean), bool)
    if measure.higher_is_better is not None and np.isfinite(mean).sum() > 1:
        best = mean == (np.nanmax(mean) if measure.higher_is_better else np.nanmin(mean))
    known = bounds[np.isfinite(bounds)]
    floor, width = (known.min(), np.ptp(known) or 1.0) if len(known) else (0.0, 1.0)
    places = np.round(100 * (bounds - floor) / width, 2)
    return [
        AreaCell(
            _number(bounds[at, 0]),
            _number(bounds[at, 1]),
            _number(bounds[at, 2]),
            int(counts[at]),
            bool(best[at]),
            tuple(places[at].tolist()),
        )
        for at in range(len(mean))
    ]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _verdict(block: np.ndarray, names: Sequence[str], cells: Sequence[AreaCell], measure: Measure) -> str:
    """How far the best is ahead of the next, on the images that both have; empty where nothing is best."""
    order = sorted(
        (at for at, cell in enumerate(cells) if cell.mean is not None),
        key=lambda at: (cells[at].mean or 0.0) * (-1 if measure.higher_is_better else 1),
    )
    if measure.higher_is_better is None or len(order) < 2:
        return ""
    first, second = order[:2]
    (pair,) = bootstrap_differences([block[:, [first, second]]])
    if not pair.count[0]:
        return ""
    told = f"{measure.title}: {names[first]} minus {names[second]}, the two best, is {pair.mean[0]:+.3f}"
    if not np.isfinite(pair.low[0]):
        return f"{told} on 1 image."
    apart = pair.low[0] > 0 or pair.high[0] < 0
    return (
        f"{told} [{pair.low[0]:+.3f}, {pair.high[0]:+.3f}] on the {pair.count[0]} images that have both: "
        f"{'told apart' if apart else 'not told apart'}."
    )
