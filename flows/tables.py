"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from tasks.leaderboard import Standing, arrow, best
from tasks.metric_families import by_family

# Columns of more numbers than this are too narrow to read their heads.
MOST_ACROSS = 8


def leaderboard_table(rows: Sequence[Standing]) -> Table:
    """The means, the best of a metric in bold; metrics go down where they are many, then the leaders alone."""
    metrics = _arrows(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.method, row.metric): row for row in rows}
    winners = best(rows)
    if len(metrics) <= MOST_ACROSS:
        table = _table("leaderboard (mean over images)", "method", metrics.values())
        for method in methods:
            table.add_row(_plain(method), *(_mean(cells.get((method, metric)), winners) for metric in metrics))
        return table
    if len(methods) <= MOST_ACROSS:
        table = _table("leaderboard (mean over images)", "metric", methods)
        for family, members in by_family(metrics, lambda metric: metric):
            table.add_row(f"[italic]{family.title.lower()}[/italic]")
            for metric in members:
                means = (_mean(cells.get((method, metric)), winners) for method in methods)
                table.add_row(_plain(metrics[metric]), *means)
        return table
    table = _table("leaderboard (best mean of each metric; the others are in the report)", "metric", ("mean", "n"))
    table.add_column("best", overflow="fold")
    for metric, head in metrics.items():
        leading = [row for row in rows if (row.method, metric) in winners and row.metric == metric]
        for row in leading[:1]:
            others = f" and {len(leading) - 1} more" if len(leading) > 1 else ""
            table.add_row(_plain(head), _mean(row, set()), str(row.count), _plain(row.method) + others)
    return table


def _arrows(rows: Sequence[Standing]) -> dict[str, str]:
    """Every metric with its direction behind it."""
    return {row.metric: f"{row.metric} {arrow(row.higher_is_better)}".rstrip() for row in rows}


def _table(title: str, first: str, others: Iterable[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for other in others:
        table.add_column(_plain(other), justify="right", overflow="fold")
    return table


def _mean(row: Standing | None, winners: set[tuple[str, str]]) -> str:
    if row is None or row.mean is None:
        return "-"
    text = f"{row.mean:.3f}"
    return f"[bold]{text}[/bold]" if (row.method, row.metric) in winners else text


def _plain(text: str) -> str:
    """Text whose brackets are no markup."""
    return text.replace("[", "\\[")
