"""The section about networks that weigh their patches: how right they are, and with how little of a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from storage.results import Results
from tasks.leaderboard import arrow
from tasks.report.concept_charts import ConceptChart, Line, line_chart
from tasks.report.figures import COLOURS, LegendEntry
from tasks.report.importance_data import VALUES, Mean, Measured, measured_networks
from tasks.report.importance_pictures import ImportanceCard, importance_cards
from tasks.stage import Context

# Two-sided 95 % of the normal distribution.
Z95 = 1.96
# Headings of the values, and whether more is better.
HEADINGS: dict[str, tuple[str, bool | None]] = {
    "accuracy": ("accuracy", True),
    "masked": ("share masked", None),
    "sparsity": ("sparsity s", False),
    "blank_correlation": ("correlation with a blank picture's", False),
    "segmentation_difference": ("segmentation difference d", False),
    "macro_iou": ("macro IoU", True),
    "blank_segmentation_difference": ("d of a blank picture's", None),
    "blank_macro_iou": ("macro IoU of a blank picture's", None),
    "reproducibility": ("reproducibility r", False),
}
# What is hidden in either direction, and how its lines look.
DIRECTIONS = {"insertion": ("least important hidden", "solid"), "deletion": ("most important hidden", "dash")}


@dataclass(frozen=True)
class NetworkRow:
    """A network with the means of its values in the order of the section's columns; None where it has none."""

    id: str
    name: str
    seeds: tuple[int, ...]
    cells: tuple[Mean | None, ...]


@dataclass(frozen=True)
class ImportanceSection:
    """What the section shows.

    ``columns``: headings of the values that some network has, with their arrows. ``thresholds``: a line a
    threshold, with accuracy and share masked of every network, insertion then deletion. ``silent``: networks
    to which no picture could be given.
    """

    images: int
    columns: tuple[tuple[str, str], ...]
    rows: tuple[NetworkRow, ...]
    thresholds: tuple[tuple[float, tuple[tuple[float, float], ...]], ...]
    legend: tuple[LegendEntry, ...]
    chart: ConceptChart
    cards: tuple[ImportanceCard, ...] = ()
    unreadable: int = 0
    silent: tuple[str, ...] = ()

    @property
    def figures(self) -> list[Any]:
        """Plotly figures, in the order in which they stand."""
        return [json.loads(self.chart.json)]


def importance_of_run(context: Context, results: Results) -> ImportanceSection | None:
    """The section of a run, or None where it evaluated no network, or none on any picture."""
    networks = measured_networks(results)
    measured = [network for network in networks if network.images]
    if not measured:
        return None
    cards, unreadable = importance_cards(context, results, {one.id: _name(one) for one in networks})
    silent = tuple(f"{_name(network)} {network.id}" for network in networks if not network.images)
    return replace(_section(measured), cards=tuple(cards), unreadable=unreadable, silent=silent)


def _section(measured: Sequence[Measured]) -> ImportanceSection:
    """The section but for its pictures, from what was measured of at least one network."""
    shown = [value for value in VALUES if any(value in one.means for one in measured)]
    return ImportanceSection(
        images=max(one.images for one in measured),
        columns=tuple((HEADINGS[value][0], arrow(HEADINGS[value][1])) for value in shown),
        rows=tuple(
            NetworkRow(one.id, _name(one), one.seeds, tuple(one.means.get(value) for value in shown))
            for one in measured
        ),
        thresholds=_thresholds(measured),
        legend=tuple(_entries(measured)),
        chart=_chart(measured),
    )


def _name(network: Measured) -> str:
    seed = "" if network.seed is None else f", seed {network.seed}"
    return f"{network.title}{seed}"


def _thresholds(measured: Sequence[Measured]) -> tuple[tuple[float, tuple[tuple[float, float], ...]], ...]:
    curves = [network.curves[direction] for network in measured for direction in DIRECTIONS]
    return tuple(
        (float(lines[0][0]), tuple((float(line[1]), float(line[2])) for line in lines))
        for lines in zip(*curves, strict=True)
    )


def _line_name(network: Measured, direction: str) -> str:
    return f"{_name(network)} {network.id}, {DIRECTIONS[direction][0]}"


def _entries(measured: Sequence[Measured]) -> list[LegendEntry]:
    """A colour for each network, and a line for either direction."""
    return [
        LegendEntry(_line_name(network, direction), COLOURS[index % len(COLOURS)], dash)
        for index, network in enumerate(measured)
        for direction, (_, dash) in DIRECTIONS.items()
    ]


def _chart(measured: Sequence[Measured]) -> ConceptChart:
    lines = []
    for network in measured:
        for direction, curve in network.curves.items():
            _, accuracy, masked = curve[np.argsort(curve[:, 2], kind="stable")].T
            spread = np.sqrt(accuracy * (1.0 - accuracy) / max(1, network.images - 1))
            lines.append(Line(_line_name(network, direction), masked, accuracy, Z95 * spread))
    top = max(float((line.y + (0.0 if line.margin is None else line.margin)).max()) for line in lines)
    return line_chart(
        "Accuracy without some of the patches",
        "mean by the mean share of patches hidden, a point a threshold",
        lines,
        _entries(measured),
        "share of patches hidden",
        "accuracy",
        (0.0, min(1.0, top) * 1.04),
        share=True,
        points=True,
    )
