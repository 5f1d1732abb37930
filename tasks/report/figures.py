"""The report's charts as Plotly figures in JSON; colours of text and grid are the page's, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tasks.curve_kinds import UNKNOWN, CurveGroup, CurveKind, kind_of
from tasks.report.curves import GRID, MeanCurve

# Okabe and Ito's palette, without its yellow, which is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6bd6", "#8c8c8c")
# The bands of more methods than this cover each other.
MOST_BANDS = 6
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Chart:
    """A figure's JSON with what stands above it and what a reader who does not see it is told."""

    kind: CurveKind
    variant: str
    description: str
    json: str


@dataclass(frozen=True)
class LegendEntry:
    """A method with its line."""

    method: str
    colour: str
    dash: str


def legend(methods: Sequence[str]) -> list[LegendEntry]:
    """A colour for every method; when they come round again, another dash."""
    return [
        LegendEntry(method, COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])
        for index, method in enumerate(methods)
    ]


def curve_charts(curves: Sequence[MeanCurve], entries: Sequence[LegendEntry]) -> list[Chart]:
    """One chart for every kind of curve, all methods in it."""
    line_of = {entry.method: entry for entry in entries}
    names = list(dict.fromkeys(one.curve for one in curves))
    ranges = _ranges(curves)
    return [
        _chart(name, [one for one in curves if one.curve == name], line_of, ranges[_scale(name)]) for name in names
    ]


def in_groups(charts: Sequence[Chart]) -> list[tuple[CurveGroup, list[Chart]]]:
    """Charts under their headings."""
    return [(group, list(members)) for group, members in groupby(charts, key=lambda chart: chart.kind.group)]


def _scale(curve: str) -> tuple[CurveGroup, str, str]:
    """What curves share that are compared with each other: then their charts have one height."""
    kind = kind_of(curve)
    return kind.group, kind.value, kind.title if kind.group is UNKNOWN else ""


def _ranges(curves: Sequence[MeanCurve]) -> dict[tuple[CurveGroup, str, str], tuple[float, float]]:
    """The range of the y axis by scale: from 0 or the lowest band to a little above the highest."""
    found: dict[tuple[CurveGroup, str, str], tuple[float, float]] = {}
    for one in curves:
        low, high = _ends(one)
        floor, top = found.get(_scale(one.curve), (0.0, 0.0))
        found[_scale(one.curve)] = (float(np.nanmin([floor, *low])), float(np.nanmax([top, *high])))
    return {
        scale: (floor - 0.04 * (top - floor) * (floor < 0), top + 0.04 * (top - floor))
        for scale, (floor, top) in found.items()
    }


def _ends(curve: MeanCurve) -> tuple[np.ndarray, np.ndarray]:
    """The band about a mean curve, within what values can be."""
    bounds = kind_of(curve.curve).bounds
    return np.clip(curve.mean - curve.margin, *bounds), np.clip(curve.mean + curve.margin, *bounds)


def _chart(
    name: str, curves: list[MeanCurve], line_of: dict[str, LegendEntry], span: tuple[float, float]
) -> Chart:
    from plotly import graph_objects

    kind = kind_of(name)
    figure = graph_objects.Figure(layout=layout(kind.share, kind.value, span, share=True))
    for one in curves:
        mean = _mean(one, line_of[one.method])
        low, high = (end[one.covered] for end in _ends(one))
        shade = band(GRID[one.covered], low, high, line_of[one.method].colour)
        figure.add_traces([shade, mean] if len(curves) <= MOST_BANDS else [mean])
    ends = "; ".join(f"{one.method} {_told(one.mean[one.covered])}" for one in curves)
    return Chart(
        kind,
        name.partition("[")[2].rstrip("]"),
        f"{kind.title} curves, mean {kind.value} by {kind.share}: {ends}.",
        figure.to_json(),
    )


def _told(mean: np.ndarray) -> str:
    """A curve in words."""
    if not len(mean):
        return "on no common point"
    return f"from {mean[0]:.2f} over {mean[len(mean) // 2]:.2f} half-way to {mean[-1]:.2f}"


def band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> object:
    """The area between two lines as a Plotly trace, in a pale shade of a colour ``#rrggbb``."""
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=[*rounded(x), *rounded(x[::-1])],
        y=[*rounded(high), *rounded(low[::-1])],
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.16)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _mean(curve: MeanCurve, line: LegendEntry) -> object:
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=rounded(GRID[curve.covered]),
        y=rounded(curve.mean[curve.covered]),
        mode="lines",
        line={"color": line.colour, "width": 2.2, "dash": line.dash},
        # Plotly reads a few tags in names: a method's id must stay text.
        name=line.method.replace("<", "&lt;"),
        hovertemplate="%{y:.3f}",
        showlegend=False,
    )


def layout(x_title: str, y_title: str, span: tuple[float, float], *, share: bool) -> dict[str, object]:
    """What a chart looks like; ``span``: of the y axis; ``share``: x runs from 0 to 100 %."""
    of_share = {"range": [0, 1], "tickformat": ".0%", "hoverformat": ".0%", "dtick": 0.2}
    axis = {"zeroline": False, "fixedrange": True, "ticks": "", "automargin": True}
    return {
        "template": None,
        "height": 300,
        "margin": {"l": 8, "r": 24, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "xaxis": {
            **axis,
            **(of_share if share else {"nticks": 6}),
            "title": {"text": x_title, "standoff": 8},
            "showgrid": False,
        },
        "yaxis": {
            **axis,
            "title": {"text": y_title, "standoff": 8},
            "range": [round(end, 4) for end in span],
            "nticks": 6,
        },
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """Four significant digits; a gap where there is no value."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]
