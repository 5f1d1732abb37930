"""The leaderboard at a glance: the rank of every method on every metric, for boards too large to take in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tasks.leaderboard import Standing, arrow
from tasks.metric_families import Family, by_family
from tasks.paired import Difference

# A board of fewer cells is seen whole as it is.
FEWEST_CELLS = 24


@dataclass(frozen=True)
class RankCell:
    """A rank, 1 the best; ``level`` with the best where their paired interval holds 0; ``shade`` 0 to 1."""

    standing: Standing
    rank: int
    level: bool
    shade: float


@dataclass(frozen=True)
class RankRow:
    """A method's ranks on all metrics; None where it has no mean."""

    method: str
    mean_rank: float
    cells: list[RankCell | None]


@dataclass(frozen=True)
class Overview:
    """Families with their metrics (id and arrow) across, methods in the order of their mean rank down."""

    families: list[tuple[Family, list[tuple[str, str]]]]
    rows: list[RankRow]


def overview(rows: Sequence[Standing], differences: Iterable[Difference]) -> Overview | None:
    """The ranks by the mean on every metric with a direction, or None for a board that is small."""
    ranked = [row for row in rows if row.mean is not None and row.higher_is_better is not None]
    methods = list(dict.fromkeys(row.method for row in ranked))
    metrics = {row.metric: arrow(row.higher_is_better) for row in ranked}
    if len(methods) < 2 or len(methods) * len(metrics) < FEWEST_CELLS:
        return None
    families = by_family(metrics.items(), lambda item: item[0])
    pairs = {(one.metric, one.first, one.second): one for one in differences}
    cells = {
        (cell.standing.method, cell.standing.metric): cell
        for metric in metrics
        for cell in _cells([row for row in ranked if row.metric == metric], pairs)
    }
    order = [metric for _, members in families for metric, _ in members]
    found = []
    for method in methods:
        row = [cells.get((method, metric)) for metric in order]
        found.append(RankRow(method, fmean(cell.rank for cell in row if cell), row))
    return Overview(families, sorted(found, key=lambda row: row.mean_rank))


def _cells(rows: Sequence[Standing], pairs: dict[tuple[str, str, str], Difference]) -> list[RankCell]:
    """The cells of one metric."""
    merits = [(row.mean or 0.0) * (1 if row.higher_is_better else -1) for row in rows]
    leader = rows[merits.index(max(merits))]
    found = []
    for row, merit in zip(rows, merits, strict=True):
        rank = 1 + sum(other > merit for other in merits)
        one = pairs.get((row.metric, row.method, leader.method)) or pairs.get(
            (row.metric, leader.method, row.method)
        )
        level = rank == 1 or (one is not None and one.low is not None and not one.told_apart)
        shade = 1.0 - (rank - 1) / max(1, len(rows) - 1)
        found.append(RankCell(row, rank, level, round(shade, 3)))
    return found
