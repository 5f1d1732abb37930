"""The report's charts as Plotly figures in JSON; colours of text and grid are the page's, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.report_curves import GRID, MeanCurve

# Okabe and Ito's palette, without its yellow, which is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6bd6", "#8c8c8c")
# The bands of more methods than this cover each other.
MOST_BANDS = 6
DASHES = ("solid", "dash", "dot", "dashdot")

TITLES = {
    "insertion": ("Insertion", "pixels revealed, most relevant first", "higher curve is better"),
    "deletion": ("Deletion", "pixels replaced, most relevant first", "lower curve is better"),
    "part_insertion": ("Part insertion", "parts revealed, highest score first", "higher curve is better"),
    "part_deletion": ("Part deletion", "parts replaced, highest score first", "lower curve is better"),
}


@dataclass(frozen=True)
class Chart:
    """A figure's JSON with what stands above it and what a reader who does not see it is told."""

    title: str
    variant: str
    subtitle: str
    direction: str
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
    # One height for all charts: they are compared with each other.
    top = max((min(1.0, float((one.mean + one.margin).max())) for one in curves), default=1.0) * 1.04
    return [_chart(name, [one for one in curves if one.curve == name], line_of, top) for name in names]


def _chart(name: str, curves: list[MeanCurve], line_of: dict[str, LegendEntry], top: float) -> Chart:
    from plotly import graph_objects

    figure = graph_objects.Figure(layout=_layout(top, parts=name.startswith("part_")))
    for one in curves:
        mean, band = _mean(one, line_of[one.method]), _band(one, line_of[one.method])
        figure.add_traces([band, mean] if len(curves) <= MOST_BANDS else [mean])
    stem, _, variant = name.partition("[")
    title, subtitle, better = TITLES.get(stem, (stem, "", ""))
    ends = "; ".join(
        f"{one.method} from {one.mean[0]:.2f} over {one.mean[len(GRID) // 2]:.2f} half-way to {one.mean[-1]:.2f}"
        for one in curves
    )
    return Chart(
        title,
        variant.rstrip("]"),
        subtitle,
        better,
        f"{title} curves, mean probability of the target class: {ends}.",
        figure.to_json(),
    )


def _band(curve: MeanCurve, line: LegendEntry) -> object:
    from plotly import graph_objects

    low = np.clip(curve.mean - curve.margin, 0.0, 1.0)
    high = np.clip(curve.mean + curve.margin, 0.0, 1.0)
    return graph_objects.Scatter(
        x=[*_rounded(GRID), *_rounded(GRID[::-1])],
        y=[*_rounded(high), *_rounded(low[::-1])],
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(line.colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.16)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _mean(curve: MeanCurve, line: LegendEntry) -> object:
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=_rounded(GRID),
        y=_rounded(curve.mean),
        mode="lines",
        line={"color": line.colour, "width": 2.2, "dash": line.dash},
        # Plotly reads a few tags in names: a method's id must stay text.
        name=line.method.replace("<", "&lt;"),
        hovertemplate="%{y:.3f}",
        showlegend=False,
    )


def _layout(top: float, *, parts: bool) -> dict[str, object]:
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
            "title": {"text": f"share of {'parts' if parts else 'pixels'}", "standoff": 8},
            "tickformat": ".0%",
            "hoverformat": ".0%",
            "range": [0, 1],
            "dtick": 0.2,
            "showgrid": False,
        },
        "yaxis": {
            **axis,
            "title": {"text": "p(target)", "standoff": 8},
            "range": [0, round(top, 4)],
            "nticks": 6,
            "hoverformat": ".3f",
        },
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
