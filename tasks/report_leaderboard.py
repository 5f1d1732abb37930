"""The leaderboard as the report shows it: metric by metric, intervals on one scale, the best marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.leaderboard import Standing, arrow, best


@dataclass(frozen=True)
class Cell:
    """A standing with its place on the metric's scale, all in percent of the cell's width."""

    standing: Standing
    best: bool
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Column:
    """A metric: its id, the arrow and the cells of all methods (None: not measured)."""

    metric: str
    arrow: str
    direction: str
    cells: dict[str, Cell | None]


def leaderboard_columns(rows: Sequence[Standing], methods: Sequence[str]) -> list[Column]:
    """The leaderboard metric by metric, with the intervals of all methods on one scale."""
    winners = best(rows)
    columns = []
    for metric in dict.fromkeys(row.metric for row in rows):
        members = {row.method: row for row in rows if row.metric == metric}
        ends = [end for row in members.values() for end in (row.low, row.mean, row.high) if end is not None]
        floor, width = (min(ends), max(ends) - min(ends)) if ends else (0.0, 0.0)
        sense = next(iter(members.values())).higher_is_better
        cells = {
            method: _cell(members[method], (method, metric) in winners, floor, width)
            if method in members
            else None
            for method in methods
        }
        said = {True: "higher is better", False: "lower is better", None: ""}[sense]
        columns.append(Column(metric, arrow(sense), said, cells))
    return columns


def _cell(row: Standing, is_best: bool, floor: float, width: float) -> Cell:
    def place(value: float | None) -> float:
        value = row.mean if value is None else value
        return 50.0 if value is None or width == 0 else round(100.0 * (value - floor) / width, 2)

    return Cell(row, is_best, place(row.low), place(row.mean), place(row.high))


def verdict(rows: Sequence[Standing]) -> str:
    """One sentence: which method has the best mean on how many metrics; empty where nothing is compared."""
    winners = best(rows)
    metrics = {metric for _, metric in winners}
    if not metrics:
        return ""
    won = {
        method: sum(one == method for one, _ in winners) for method in dict.fromkeys(row.method for row in rows)
    }
    most = max(won.values())
    leaders = [method for method, count in won.items() if count == most]
    verb = "has" if len(leaders) == 1 else "each have"
    noun = "metric" if len(metrics) == 1 else "metrics"
    return f"{' and '.join(leaders)} {verb} the best mean on {most} of {len(metrics)} {noun}."
