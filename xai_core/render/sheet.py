"""One image explained on one sheet: the picture, its parts, every method, top classes and top parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xai_core.parts.labels import NO_PART
from xai_core.render.overlays import overlay
from xai_core.render.part_maps import part_colours, part_map

TOP_CLASSES = 5
TOP_PARTS = 5
DOTS_PER_INCH = 144

# The page in inches: tiles side by side, below them panels of bars that are each two tiles wide.
COLUMNS = 4
MARGIN = 0.35
TILE = 2.5
GAP = 0.18
CAPTION = 0.3
HEADLINE = 0.75
PANEL = 2.0
NAMES = 1.75
NUMBERS = 0.6

INK = "#1c1f26"
QUIET = "#667085"
TRACK = "#eef0f4"
ACCENT = "#3457d5"


def explanation_sheet(
    picture: np.ndarray,
    title: str,
    classes: Sequence[tuple[str, float]],
    part_labels: np.ndarray,
    methods: Mapping[str, np.ndarray],
    part_scores: Mapping[str, np.ndarray],
) -> Any:
    """A sheet that explains one image, as a PIL picture.

    Args:
        picture: uint8 ``[H, W, 3]``; title: the headline, as plain text.
        classes: names with probabilities in [0, 1], best first; the first five are shown.
        part_labels: uint8 ``[H, W]``, 255 where there is no part.
        methods: a map ``[H, W]`` for each method.
        part_scores: scores ``[K]`` of the methods that score parts, NaN where a part has none.

    Raises:
        UsageError: a map or the parts do not have the picture's size.
    """
    tiles = {
        "image": picture,
        "parts": part_map(picture, part_labels),
        **{name: overlay(picture, values) for name, values in methods.items()},
    }
    page = _Page(len(tiles), 1 + len(part_scores), picture.shape[0] / picture.shape[1])
    page.write_title(title)
    for index, (name, tile) in enumerate(tiles.items()):
        axes = page.tile(index)
        _draw_tile(axes, name, tile)
        if name == "parts":
            _number_parts(axes, part_labels)
    _draw_classes(page.panel(0), classes)
    for index, (name, scores) in enumerate(part_scores.items()):
        _draw_parts(page.panel(1 + index), name, scores)
    return to_picture(page.figure)


class _Page:
    """A figure as large as its tiles and panels need, and the place of each of them."""

    def __init__(self, tiles: int, panels: int, aspect: float) -> None:
        from matplotlib.figure import Figure

        rows = -(-tiles // COLUMNS)
        self.columns = max(2, -(-tiles // rows))
        self.panel_columns = min(panels, 1 if self.columns == 2 else 2)
        self.tile_height = TILE * aspect
        self.panels_top = HEADLINE + -(-tiles // self.columns) * (self.tile_height + CAPTION + GAP) + GAP
        self.width = 2 * MARGIN + self.columns * (TILE + GAP) - GAP
        self.height = self.panels_top + -(-panels // self.panel_columns) * PANEL + MARGIN / 2
        self.figure = Figure(figsize=(self.width, self.height), dpi=DOTS_PER_INCH, facecolor="white")

    def write_title(self, title: str) -> None:
        """The headline."""
        place = (MARGIN / self.width, 1 - 0.5 * HEADLINE / self.height)
        self.figure.text(
            *place, plain(_shorten(title, 90)), fontsize=15, fontweight="bold", color=INK, va="center"
        )

    def tile(self, index: int) -> Any:
        """The axes of a tile, counted row by row."""
        row, column = divmod(index, self.columns)
        top = HEADLINE + CAPTION + row * (self.tile_height + CAPTION + GAP)
        return self._axes(MARGIN + column * (TILE + GAP), top, TILE, self.tile_height)

    def panel(self, index: int) -> Any:
        """The axes of a panel of bars, without the room for names and numbers beside it."""
        row, column = divmod(index, self.panel_columns)
        width = (self.width - 2 * MARGIN + GAP) / self.panel_columns - GAP
        left = MARGIN + column * (width + GAP)
        top = self.panels_top + CAPTION + row * PANEL
        return self._axes(left + NAMES, top, width - NAMES - NUMBERS, PANEL - CAPTION - 2 * GAP)

    def _axes(self, left: float, top: float, width: float, height: float) -> Any:
        bottom = self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)


def _draw_tile(axes: Any, name: str, tile: np.ndarray) -> None:
    axes.imshow(tile, interpolation="lanczos", aspect="auto")
    axes.set_title(plain(_shorten(name, 34)), fontsize=9, color=INK, loc="left", pad=5)
    axes.axis("off")


def _number_parts(axes: Any, labels: np.ndarray) -> None:
    """The number of each part where the part is widest."""
    from matplotlib.patheffects import withStroke
    from scipy.ndimage import distance_transform_edt

    for part in np.unique(labels[labels != NO_PART]):
        depth = distance_transform_edt(np.pad(labels == part, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        axes.text(
            x, y, str(part), color="white", fontsize=8, fontweight="bold", ha="center", va="center"
        ).set_path_effects([withStroke(linewidth=2, foreground=INK)])


def _draw_classes(axes: Any, classes: Sequence[tuple[str, float]]) -> None:
    shown = list(classes)[:TOP_CLASSES]
    names = [_shorten(name, 24) for name, _ in shown]
    values = np.array([value for _, value in shown], np.float64)
    _draw_bars(axes, "top classes", names, values, 1.0, [ACCENT] * len(shown), "{:.1%}")


def _draw_parts(axes: Any, method: str, scores: np.ndarray) -> None:
    order = [int(part) for part in np.argsort(-np.nan_to_num(scores, nan=-np.inf)) if np.isfinite(scores[part])]
    shown = order[:TOP_PARTS]
    values = np.array([scores[part] for part in shown], np.float64)
    tints = [tuple(colour / 255) for colour in part_colours(len(scores))[shown]]
    largest = float(np.abs(values).max()) if len(values) else 1.0
    heading = f"top parts, {_shorten(method, 30)}"
    _draw_bars(axes, heading, [f"part {part}" for part in shown], values, largest or 1.0, tints, "{:.3g}")


def _draw_bars(
    axes: Any,
    heading: str,
    names: list[str],
    values: np.ndarray,
    full: float,
    tints: Sequence[Any],
    number: str,
) -> None:
    """Horizontal bars on a track of length ``full``, the numbers at its end."""
    places = np.arange(len(names))
    axes.barh(places, [full] * len(names), color=TRACK, height=0.62)
    axes.barh(places, np.abs(values), color=tints, height=0.62)
    for place, value in zip(places, values, strict=True):
        axes.text(full * 1.03, place, number.format(value), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(places, [plain(name) for name in names], fontsize=8.5, color=INK)
    axes.set_xticks([])
    axes.set_xlim(0, full)
    axes.set_ylim(max(TOP_CLASSES, len(names)) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.set_title(plain(heading), fontsize=9, color=QUIET, loc="left", pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def to_picture(figure: Any) -> Any:
    """A figure drawn, as a PIL picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
