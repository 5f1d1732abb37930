"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from tasks.leaderboard import Standing


def leaderboard_table(rows: Sequence[Standing]) -> Table:
    """Methods by metrics: the mean of each, the best of a metric in bold."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    cells = {(row.method, row.metric): row for row in rows}
    table = Table(title="leaderboard (mean over images)", box=box.SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    for metric in metrics:
        row = next(row for row in rows if row.metric == metric)
        arrow = "↑" if row.higher_is_better else "↓"
        table.add_column(f"{metric} {arrow}".replace("[", "\\["), justify="right", overflow="fold")
    best = {metric: _best([row for row in rows if row.metric == metric]) for metric in metrics}
    for method in dict.fromkeys(row.method for row in rows):
        shown = [_cell(cells.get((method, metric)), best[metric]) for metric in metrics]
        table.add_row(method.replace("[", "\\["), *shown)
    return table


def _best(rows: Sequence[Standing]) -> float | None:
    means = [row.mean for row in rows if row.mean is not None]
    if not means:
        return None
    return max(means) if rows[0].higher_is_better else min(means)


def _cell(row: Standing | None, best: float | None) -> str:
    if row is None or row.mean is None:
        return "-"
    text = f"{row.mean:.3f}"
    return f"[bold]{text}[/bold]" if row.mean == best else text
