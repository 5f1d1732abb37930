"""The leaderboard of a run: every method's mean on every metric, with its uncertainty and its gaps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

import xai_core.metrics  # noqa: F401  (registers the metrics)
from storage.results import Results
from storage.store import Store
from tasks.bootstrap import bootstrap_means
from xai_core.registry import metrics


@dataclass(frozen=True)
class Standing:
    """A method's mean on one metric with its 95 % bootstrap interval.

    ``count`` images stand behind the mean, ``nulls`` have no defined value. ``mean`` is None without a
    value, ``low`` and ``high`` with fewer than two; ``higher_is_better`` for a metric no longer registered.
    """

    method: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    count: int
    nulls: int
    higher_is_better: bool | None


def leaderboard(store: Store, run_id: str) -> list[Standing]:
    """The standings of a run from what is committed of it, methods and metrics in the config's order.

    Raises:
        StoreError: no such run in the store.
    """
    return standings(store.results(run_id))


def standings(results: Results) -> list[Standing]:
    """The standings of the results of one run."""
    rows = results.select("metrics").table("metrics")
    if rows.num_rows == 0:
        return []
    rows = rows.combine_chunks()
    cells, cell_of_row = _cells(rows)
    images, image_of_row = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
    values = np.full((len(images), len(cells)), np.nan)
    values[image_of_row, cell_of_row] = rows["value"].to_numpy()
    given = np.bincount(cell_of_row, minlength=len(cells))
    means, lows, highs = bootstrap_means(values)
    counts = (~np.isnan(values)).sum(axis=0)
    return [
        Standing(
            method,
            metric,
            _number(means[index]),
            _number(lows[index]),
            _number(highs[index]),
            int(counts[index]),
            int(given[index] - counts[index]),
            direction(metric),
        )
        for index, (method, metric) in enumerate(cells)
    ]


def direction(metric: str) -> bool | None:
    """Whether more is better, by a metric's id; None where it is no longer registered."""
    name = metric.split("[")[0]
    return metrics.get(name).higher_is_better if name in metrics else None


def best(rows: Iterable[Standing]) -> set[tuple[str, str]]:
    """(method, metric) of the best mean of every metric that has a direction and at least two methods."""
    by_metric: dict[str, list[Standing]] = {}
    for row in rows:
        if row.mean is not None and row.higher_is_better is not None:
            by_metric.setdefault(row.metric, []).append(row)
    winners = set()
    for metric, rivals in by_metric.items():
        means = [row.mean for row in rivals if row.mean is not None]
        top = max(means) if rivals[0].higher_is_better else min(means)
        winners |= {(row.method, metric) for row in rivals if row.mean == top and len(rivals) > 1}
    return winners


def arrow(higher_is_better: bool | None) -> str:
    """The direction as a sign: an arrow up, down, or nothing."""
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def leaderboard_markdown(rows: list[Standing]) -> str:
    """The standings as a Markdown table: methods down, metrics across, the best of each in bold."""
    if not rows:
        return "No metric has been measured.\n"
    names = list(dict.fromkeys(row.metric for row in rows))
    arrows = {row.metric: arrow(row.higher_is_better) for row in rows}
    winners = best(rows)
    cells = {(row.method, row.metric): _markdown_cell(row, (row.method, row.metric) in winners) for row in rows}
    lines = [
        f"| method | {' | '.join(f'{_escape(name)} {arrows[name]}'.rstrip() for name in names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        values = " | ".join(cells.get((method, name), "") for name in names)
        lines.append(f"| {_escape(method)} | {values} |")
    lines += ["", "Mean [95 % bootstrap interval] over n images; undefined values are left out and counted."]
    return "\n".join(lines) + "\n"


def _markdown_cell(row: Standing, is_best: bool) -> str:
    if row.mean is None:
        return f"undefined ({row.nulls})"
    number = f"**{row.mean:.3f}**" if is_best else f"{row.mean:.3f}"
    interval = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
    gaps = f", {row.nulls} undefined" if row.nulls else ""
    return f"{number}{interval} n={row.count}{gaps}"


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("_", r"\_").replace("*", r"\*").replace("<", "&lt;")


def _cells(rows: pa.Table) -> tuple[list[tuple[str, str]], np.ndarray]:
    """The distinct (method, metric) pairs in order of appearance and the position of every row's pair."""
    method = rows["method"].combine_chunks().dictionary_encode()
    metric = rows["metric"].combine_chunks().dictionary_encode()
    names, others = method.dictionary.to_pylist(), metric.dictionary.to_pylist()
    code = method.indices.to_numpy().astype(np.int64) * len(others) + metric.indices.to_numpy()
    present, position = np.unique(code, return_inverse=True)
    return [(names[one // len(others)], others[one % len(others)]) for one in present], position


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
