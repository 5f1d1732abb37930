"""The leaderboard as the report shows it: family by family, intervals on one scale, the best marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.results import Results
from tasks.bootstrap import RESAMPLES
from tasks.leaderboard import Gap, Standing, arrow, best, gaps, standings_of
from tasks.measurements import measurements
from tasks.metric_families import Family, by_family
from tasks.paired import duels, paired_differences
from tasks.report.overview import Overview, overview
from tasks.report.paired import DuelRow, PairTable, claims, duel_rows, pair_table


@dataclass(frozen=True)
class Cell:
    """A standing with its place on the metric's scale, all in percent of the cell's width."""

    standing: Standing
    best: bool
    low: float
    mean: float
    high: float

    @property
    def why(self) -> str:
        """Why values are missing, as one line."""
        return "; ".join(f"{reason}: {images}" for reason, images in self.standing.reasons.items())


@dataclass(frozen=True)
class Column:
    """A metric: its id, the arrow and the cells of all methods (None: not measured)."""

    metric: str
    arrow: str
    direction: str
    cells: dict[str, Cell | None]


@dataclass(frozen=True)
class GapRow:
    """A reason for missing values of a metric, with the methods that it applies to in words."""

    metric: str
    reason: str
    methods: str


@dataclass(frozen=True)
class Section:
    """A family of metrics: its columns, its pairs and what is missing."""

    family: Family
    columns: list[Column]
    pairs: list[PairTable]
    gaps: list[GapRow]


@dataclass(frozen=True)
class Board:
    """All that the report shows of the leaderboard."""

    methods: list[str]
    sections: list[Section]
    overview: Overview | None
    duels: list[DuelRow]
    verdict: str
    pairs: int
    resamples: int = RESAMPLES


def board_of(results: Results, methods: Sequence[str]) -> Board:
    """The leaderboard of a run, the methods in the order given."""
    measured = measurements(results)
    rows, differences = standings_of(measured), paired_differences(measured)
    found = duels(differences)
    by_metric = {metric: [one for one in differences if one.metric == metric] for metric in measured.metrics}
    sections = []
    for family, members in by_family(rows, lambda row: row.metric):
        columns = leaderboard_columns(members, methods)
        pairs = [pair_table(column.metric, members, by_metric[column.metric]) for column in columns]
        missing = [_gap_row(gap, methods) for gap in gaps(members)]
        sections.append(Section(family, columns, [table for table in pairs if table], missing))
    return Board(
        list(methods),
        sections,
        overview(rows, differences),
        duel_rows(found),
        " ".join(sentence for sentence in (verdict(rows), claims(leaders(rows), found)) if sentence),
        len(measured.methods) * (len(measured.methods) - 1) // 2,
    )


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


def _gap_row(gap: Gap, methods: Sequence[str]) -> GapRow:
    counts = set(gap.images.values())
    if len(gap.images) == len(methods) > 1 and len(counts) == 1:
        return GapRow(gap.metric, gap.reason, f"every method: {counts.pop()}")
    named = ", ".join(f"{method}: {images}" for method, images in gap.images.items())
    return GapRow(gap.metric, gap.reason, named)


def leaders(rows: Sequence[Standing]) -> list[str]:
    """The methods with the most best means; none where nothing is compared."""
    won = [method for method, _ in best(rows)]
    most = max((won.count(method) for method in won), default=0)
    return [method for method in dict.fromkeys(row.method for row in rows) if most and won.count(method) == most]


def verdict(rows: Sequence[Standing]) -> str:
    """One sentence: which method has the best mean on how many metrics; empty where nothing is compared."""
    winners = best(rows)
    metrics = {metric for _, metric in winners}
    if not metrics:
        return ""
    first = leaders(rows)
    count = sum(method == first[0] for method, _ in winners)
    verb = "has" if len(first) == 1 else "each have"
    noun = "metric" if len(metrics) == 1 else "metrics"
    named = " and ".join(filter(None, (", ".join(first[:-1]), first[-1])))
    return f"{named} {verb} the best mean on {count} of {len(metrics)} {noun}."
