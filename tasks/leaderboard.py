"""The leaderboard of a run: every method's mean on every metric, with its uncertainty and its gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.results import Results
from storage.store import Store
from tasks.bootstrap import bootstrap_means
from tasks.measurements import Measurements, measurements
from tasks.metric_families import by_family, entry_of


@dataclass(frozen=True)
class Standing:
    """A method's mean on one metric with its 95 % bootstrap interval.

    ``count`` images stand behind the mean, ``nulls`` have no defined value, ``reasons`` says why and of how many.
    ``mean`` is None without a value, ``low`` and ``high`` with fewer than two; ``higher_is_better`` for a metric
    that is no longer registered.
    """

    method: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    count: int
    nulls: int
    higher_is_better: bool | None
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """Why a metric has no value on some images: the images of every method that the reason applies to."""

    metric: str
    reason: str
    images: Mapping[str, int]


def leaderboard(store: Store, run_id: str) -> list[Standing]:
    """The standings of a run from what is committed of it, methods and metrics in the config's order.

    Raises:
        StoreError: no such run in the store.
    """
    rows = standings(store.results(run_id))
    run = store.runs.read(run_id)
    # Records come sorted by their names.
    told = [row["method"] for row in run.tables.get("method_info", ())] if run else []
    place = {method: index for index, method in enumerate(told)}
    return sorted(rows, key=lambda row: place.get(row.method, len(place)))


def standings(results: Results) -> list[Standing]:
    """The standings of the results of one run."""
    return standings_of(measurements(results))


def standings_of(measured: Measurements) -> list[Standing]:
    """The standings of one run's values, method by method."""
    if not measured.metrics:
        return []
    values = np.concatenate([measured.values[metric] for metric in measured.metrics], axis=1)
    cells = [(method, metric) for metric in measured.metrics for method in measured.methods]
    column_of = {cell: column for column, cell in enumerate(cells)}
    means, lows, highs = bootstrap_means(values)
    counts = (~np.isnan(values)).sum(axis=0)

    def standing(method: str, metric: str) -> Standing:
        column, missing = column_of[method, metric], measured.missing[method, metric]
        mean, low, high = (_number(bound[column]) for bound in (means, lows, highs))
        why = dict(missing.most_common())
        return Standing(
            method, metric, mean, low, high, int(counts[column]), missing.total(), direction(metric), why
        )

    return [
        standing(method, metric)
        for method in measured.methods
        for metric in measured.metrics
        if (method, metric) in measured.missing
    ]


def direction(metric: str) -> bool | None:
    """Whether more is better, by a metric's id; None where it is no longer registered."""
    entry = entry_of(metric)
    return entry.higher_is_better if entry else None


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


def gaps(rows: Iterable[Standing]) -> list[Gap]:
    """Every reason why values are missing, metric by metric."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        reasons = found.setdefault(row.metric, {})
        for reason, images in row.reasons.items():
            reasons.setdefault(reason, {})[row.method] = images
    return [Gap(metric, reason, images) for metric, reasons in found.items() for reason, images in reasons.items()]


def arrow(higher_is_better: bool | None) -> str:
    """The direction as a sign: an arrow up, down, or nothing."""
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def leaderboard_markdown(rows: Sequence[Standing]) -> str:
    """The standings as Markdown, a table a family: methods down, metrics across, the best of each in bold."""
    if not rows:
        return "No metric has been measured.\n"
    families = by_family(rows, lambda row: row.metric)
    lines = []
    for family, members in families:
        lines += [f"### {family.title}", ""] if len(families) > 1 else []
        lines += [*_markdown_table(members), ""]
    lines += ["Mean [95 % bootstrap interval] over n images; undefined values are left out and counted."]
    found = gaps(rows)
    if found:
        lines += ["", "Undefined, and on how many images:", "", *(_markdown_gap(gap) for gap in found)]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Standing]) -> list[str]:
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
    return lines


def _markdown_cell(row: Standing, is_best: bool) -> str:
    if row.mean is None:
        return f"undefined ({row.nulls})"
    number = f"**{row.mean:.3f}**" if is_best else f"{row.mean:.3f}"
    interval = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
    missing = f", {row.nulls} undefined" if row.nulls else ""
    return f"{number}{interval} n={row.count}{missing}"


def _markdown_gap(gap: Gap) -> str:
    methods = ", ".join(f"{_escape(method)} {images}" for method, images in gap.images.items())
    return f"- {_escape(gap.metric)}: {_escape(gap.reason)}: {methods}"


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("_", r"\_").replace("*", r"\*").replace("<", "&lt;")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
