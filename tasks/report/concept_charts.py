"""Charts of the concept section: curves of concept insertion and deletion, and the training of autoencoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.report.concept_rows import Z95
from tasks.report.figures import MOST_BANDS, LegendEntry, band, layout, legend, rounded

# A training log has a row for every few steps; a line of more points looks the same.
MOST_POINTS = 300
# Of whole numbers along an axis.
MOST_TICKS = 8


@dataclass(frozen=True)
class InsertionCurves:
    """Curves of one attribution method (iERF, section VI-C): ``[B, T, steps + 1]`` for images and targets.

    Alignment with the target relative to the unchanged one, NaN where it is undefined.
    """

    insertion: np.ndarray
    deletion: np.ndarray


@dataclass(frozen=True)
class ConceptChart:
    """A Plotly figure in JSON with its heading and what a reader who does not see it is told."""

    title: str
    subtitle: str
    description: str
    json: str


@dataclass(frozen=True)
class ChartGroup:
    """Charts side by side with one legend."""

    title: str
    hint: str
    legend: tuple[LegendEntry, ...]
    charts: tuple[ConceptChart, ...]


@dataclass(frozen=True)
class Line:
    """A line to draw; ``margin`` is half the height of its band, None without one."""

    name: str
    x: np.ndarray
    y: np.ndarray
    margin: np.ndarray | None = None


MEASURES = (
    ("insertion", "Concept insertion", "concepts put in, most influential first; higher curve is better"),
    ("deletion", "Concept deletion", "concepts taken out, most influential first; lower curve is better"),
)
TRAINED = (
    ("rel_l2", "Relative L2", "what the codes fail to rebuild; 0 is perfect"),
    ("l0", "L0", "latents that fire for a vector"),
    ("dead", "Dead latents", "share of latents that have not fired for long"),
)


def curves_of(rows: pa.Table, extractor: str) -> dict[str, InsertionCurves]:
    """The curves of one extractor's concepts from rows of ``concept_curves``, all targets of an image averaged.

    An undefined curve has no alignment at any step; an image without a defined one is NaN.
    """
    means = (
        rows.filter(pc.equal(rows["extractor"], extractor))
        .group_by(["attribution_method", "curve", "image_id", "step"], use_threads=False)
        .aggregate([("alignment", "mean")])
        if rows.num_rows
        else rows
    )
    found = {}
    for method in dict.fromkeys(means["attribution_method"].to_pylist()):
        of_method = means.filter(pc.equal(means["attribution_method"], method))
        images = {image: at for at, image in enumerate(sorted(set(of_method["image_id"].to_pylist())))}
        kinds = {}
        for name, _, _ in MEASURES:
            part = of_method.filter(pc.equal(of_method["curve"], name))
            values = np.full((len(images), 1, 1 + max(part["step"].to_pylist(), default=0)), np.nan)
            at = [images[image] for image in part["image_id"].to_pylist()]
            values[at, 0, part["step"].to_numpy()] = part["alignment_mean"].to_numpy()
            kinds[name] = values
        found[method] = InsertionCurves(**kinds)
    return found


def insertion_charts(curves: Mapping[str, InsertionCurves]) -> ChartGroup | None:
    """Mean curves of concept insertion and deletion by attribution method, or None without any."""
    if not curves:
        return None
    entries = legend(list(curves))
    charts = []
    for name, title, subtitle in MEASURES:
        lines = [_mean_line(method, np.asarray(getattr(of, name))) for method, of in curves.items()]
        span = (0.0, max((float(np.nanmax(line.y, initial=1.0)) for line in lines), default=1.0) * 1.04)
        charts.append(
            line_chart(title, subtitle, lines, entries, "share of concepts", "alignment", span, share=True)
        )
    images = max(int(_defined(np.asarray(of.insertion)).sum()) for of in curves.values())
    hint = (
        "Alignment with the target concept, 1 with all concepts of the layer in place. Mean over "
        f"{images} {'image' if images == 1 else 'images'}, each the mean over its targets"
    )
    bands = ", with bands of ± 1.96 standard errors" if len(curves) <= MOST_BANDS else ""
    return ChartGroup("Concepts put in and taken out", f"{hint}{bands}.", tuple(entries), tuple(charts))


def _mean_line(name: str, values: np.ndarray) -> Line:
    """The mean over images of the means over targets; targets of one image are not independent."""
    known = np.isfinite(values).all(axis=2, keepdims=True)
    shown = _defined(values)
    by_image = np.where(known, values, 0.0)[shown].sum(axis=1) / known[shown].sum(axis=1)
    x = np.linspace(0.0, 1.0, values.shape[-1])
    if not len(by_image):
        return Line(name, x, np.full(len(x), np.nan))
    spread = by_image.std(axis=0, ddof=1) if len(by_image) > 1 else np.zeros(len(x))
    return Line(name, x, by_image.mean(axis=0), Z95 * spread / np.sqrt(len(by_image)))


def _defined(values: np.ndarray) -> np.ndarray:
    """The images that have a whole curve for some target: ``[B]``."""
    return np.asarray(np.isfinite(values).all(axis=2).any(axis=1))


def training_charts(rows: pa.Table) -> ChartGroup | None:
    """Training curves of every layer and extractor, or None where nothing was trained."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        groups.setdefault(f"{row['layer']} · {row['extractor']}", []).append(row)
    if not groups:
        return None
    entries = legend(list(groups))
    charts = []
    for column, title, subtitle in TRAINED:
        lines = [_training_line(name, members, column) for name, members in groups.items()]
        top = max(float(np.nanmax(line.y, initial=0.0)) for line in lines)
        span = (0.0, 1.04 * top or 1.0)
        charts.append(line_chart(title, subtitle, lines, entries, "vectors seen", column.replace("_", " "), span))
    hint = "While the autoencoders were trained, by the vectors that they had seen."
    return ChartGroup("Training of sparse autoencoders", hint, tuple(entries), tuple(charts))


def _training_line(name: str, rows: list[dict[str, Any]], column: str) -> Line:
    ordered = sorted(rows, key=lambda row: row["step"])
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MOST_POINTS)).round().astype(int))
    values = [np.nan if ordered[at][column] is None else ordered[at][column] for at in kept]
    return Line(name, np.array([ordered[at]["vectors"] for at in kept], np.float64), np.array(values, np.float64))


def line_chart(
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    entries: Sequence[LegendEntry],
    x_title: str,
    y_title: str,
    span: tuple[float, float],
    *,
    share: bool = False,
    points: bool = False,
    whole: bool = False,
) -> ConceptChart:
    """Lines with their bands, in the look of the report's other charts.

    ``share``: x runs from 0 to 100 %; ``points``: they are shown where values were measured; ``whole``: x is
    counted.
    """
    from plotly import graph_objects

    look = {entry.method: entry for entry in entries}
    figure = graph_objects.Figure(layout=layout(x_title, y_title, span, share=share))
    if whole:
        figure.update_xaxes(dtick=max(1, round(max(float(line.x.max()) for line in lines) / MOST_TICKS)))
    for line in lines:
        entry = look[line.name]
        if line.margin is not None and len(lines) <= MOST_BANDS:
            low, high = line.y - line.margin, line.y + line.margin
            figure.add_trace(band(line.x, low, high, entry.colour))
        figure.add_trace(
            graph_objects.Scatter(
                x=rounded(line.x),
                y=rounded(line.y),
                mode="lines+markers" if points else "lines",
                line={"color": entry.colour, "width": 2.2, "dash": entry.dash},
                # Plotly reads a few tags in names.
                name=line.name.replace("<", "&lt;"),
                hovertemplate="%{y:.3~f}",
                showlegend=False,
            )
        )
    ends = "; ".join(_told(line) for line in lines)
    return ConceptChart(title, subtitle, f"{title}, {y_title} by {x_title}: {ends}.", figure.to_json())


def _told(line: Line) -> str:
    known = line.y[np.isfinite(line.y)]
    return f"{line.name} from {known[0]:.3g} to {known[-1]:.3g}" if len(known) else f"{line.name} undefined"
