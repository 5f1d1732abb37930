"""A concept on one sheet: its top exemplars, the evidence of their receptive fields outlined and cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xai_core.errors import UsageError
from xai_core.render.evidence import (
    SHARE,
    SMOOTHING,
    Window,
    crop_window,
    evidence_tile,
    level_of,
    spread,
)
from xai_core.render.sheet import DOTS_PER_INCH, INK, QUIET, plain, to_picture
from xai_core.render.text import shortened

TILE_SIDE = 128

# The page in inches: for each exemplar the picture, below it the crop, below them the caption.
COLUMNS = 5
MARGIN = 0.3
TILE = 1.85
GAP = 0.14
LINE = 0.17
HEADLINE = 0.62
POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Exemplars:
    """The exemplars of one concept, best first.

    Attributes:
        pictures: ``[n, 3, H, W]`` in [0, 1], as the model saw them.
        fields: ``[n, r, c]``, the receptive fields (iERF) of the exemplars' vectors at any resolution.
        positions: integers ``[n, 2]``, row and column of each vector in the layer's ``grid``; a row below 0 is
            a class token or another one without a place in the picture.
        grid: rows and columns of the layer.
        captions: a text for each; its lines are the caption's.

    Raises:
        UsageError: arrays that do not fit together, an empty list, pictures outside of [0, 1], or a position
            beyond the grid.
    """

    pictures: np.ndarray
    fields: np.ndarray
    positions: np.ndarray
    grid: tuple[int, int]
    captions: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("pictures", "fields", "positions"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        count = len(self.captions)
        shapes = (self.pictures.shape, self.fields.shape, self.positions.shape)
        if count == 0 or shapes[0][:2] != (count, 3) or [len(one) for one in shapes] != [4, 3, 2]:
            raise UsageError(
                f"exemplars: expected pictures [n, 3, H, W], fields [n, r, c], positions [n, 2] and n captions, "
                f"n at least 1, got {shapes} and {count} captions"
            )
        if shapes[1][0] != count or shapes[2] != (count, 2):
            raise UsageError(
                f"exemplars: expected {count} fields and positions [{count}, 2] as there are pictures, got "
                f"{shapes[1]} and {shapes[2]}"
            )
        if not (self.pictures.min() >= 0 and self.pictures.max() <= 1):
            raise UsageError(
                f"pictures: expected values in [0, 1], got {self.pictures.min():.3g} to "
                f"{self.pictures.max():.3g}; undo the model's normalisation first (Classifier.denormalise)"
            )
        placed = self.positions[self.positions[:, 0] >= 0]
        if len(placed) and not ((placed >= 0) & (placed < np.array(self.grid))).all():
            raise UsageError(
                f"positions: expected rows and columns inside the layer's grid {tuple(self.grid)}, got "
                f"{placed.max(axis=0).tolist()}; give positions in the grid, not in pixels"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> Exemplars:
        """The best of them."""
        pictures, fields, positions = (one[:count] for one in (self.pictures, self.fields, self.positions))
        return Exemplars(pictures, fields, positions, self.grid, self.captions[:count])


def evidence_region(
    field: np.ndarray, size: tuple[int, int], *, share: float = SHARE, smoothing: float = SMOOTHING
) -> np.ndarray:
    """The smallest region of a picture that holds a share of a receptive field's positive mass.

    Args:
        field: ``[r, c]`` at any resolution; size: of the picture; share: above 0, at most 1.
        smoothing: see :func:`xai_core.render.evidence.spread`; 0 takes the field as it is.

    Returns:
        bool ``[H, W]``; False everywhere where nothing is positive.

    Raises:
        UsageError: a share out of its range.
    """
    evidence = spread(field, size, smoothing)
    return evidence >= level_of(evidence, share)


def concept_tiles(
    exemplars: Exemplars, *, side: int = TILE_SIDE, crop: bool = True, lines: bool = True, share: float = SHARE
) -> list[np.ndarray]:
    """The exemplars as small pictures: evidence outlined, the rest dimmed, the vector's position marked.

    Args:
        side: width in pixels; crop: show the evidence's surroundings, a square, instead of the whole picture.
        lines: draw outline and position; without them a very small picture is easier to recognise.
        share: of the receptive field's positive mass that the outlined region holds.

    Returns:
        uint8 ``[h, side, 3]`` each.

    Raises:
        UsageError: a share out of its range.
    """
    return [one.tile(side, crop, lines) for one in _evidence(exemplars, share)]


@dataclass(frozen=True)
class _Evidence:
    """One exemplar, ready to be drawn: ``picture [H, W, 3]`` in [0, 255], ``evidence [H, W]`` and its level."""

    picture: np.ndarray
    evidence: np.ndarray
    level: float
    cell: Window | None

    def tile(self, side: int, crop: bool, lines: bool = True) -> np.ndarray:
        """Drawn, ``side`` pixels wide."""
        whole = Window(0, 0, *self.evidence.shape)
        window = crop_window(self.evidence, self.level) if crop else whole
        return evidence_tile(self.picture, self.evidence, self.level, window, side, self.cell, lines=lines)


def _evidence(exemplars: Exemplars, share: float) -> list[_Evidence]:
    size = exemplars.pictures.shape[2:]
    found = []
    for picture, field, position in zip(exemplars.pictures, exemplars.fields, exemplars.positions, strict=True):
        evidence = spread(field, size)
        pixels = 255.0 * np.moveaxis(picture.astype(np.float64), 0, -1)
        found.append(_Evidence(pixels, evidence, level_of(evidence, share), _cell(position, exemplars.grid, size)))
    return found


def _cell(position: np.ndarray, grid: tuple[int, int], size: Sequence[int]) -> Window | None:
    """The pixels of a position, None where it has none."""
    row, column = (int(one) for one in position)
    if row < 0:
        return None
    height, width = (whole / count for whole, count in zip(size, grid, strict=True))
    return Window(row * height, column * width, (row + 1) * height, (column + 1) * width)


def concept_sheet(exemplars: Exemplars, title: str, *, note: str = "", share: float = SHARE) -> Any:
    """A sheet that shows what a concept stands for, as a PIL picture (iERF, section VI-D and figure 9).

    For each exemplar the whole picture and, below it, the evidence cropped. What is outlined is the smallest
    region that holds ``share`` of the receptive field; the white box is the vector's position.

    Args:
        exemplars: best first; title: the headline; note: a line below it, both plain text.

    Raises:
        UsageError: a share out of its range.
    """
    side = round(TILE * DOTS_PER_INCH)
    drawn = _evidence(exemplars, share)
    whole, crops = ([one.tile(side, crop) for one in drawn] for crop in (False, True))
    captions = [caption.splitlines() for caption in exemplars.captions]
    page = _Page(len(exemplars), whole[0].shape[0] / side, max(map(len, captions)))
    room = page.width - 2 * MARGIN
    page.write(MARGIN, 0.27, title, room, size=12.5, colour=INK, bold=True)
    page.write(MARGIN, 0.27 + 1.35 * LINE, note, room, size=8.5, colour=QUIET)
    for index, (picture, crop, lines) in enumerate(zip(whole, crops, captions, strict=True)):
        left, top = page.place(index)
        page.show(left, top, picture)
        page.show(left, top + page.tile_height + GAP / 2, crop)
        top += page.tile_height + TILE + GAP / 2 + 0.25 * LINE
        for number, line in enumerate(lines):
            page.write(left, top + LINE * (number + 0.5), line, TILE, size=8, colour=QUIET if number else INK)
    return to_picture(page.figure)


class _Page:
    """A figure as large as its exemplars need, measured in inches from its upper left corner."""

    def __init__(self, exemplars: int, aspect: float, lines: int) -> None:
        from matplotlib.figure import Figure

        self.tile_height = TILE * aspect
        self.columns = min(COLUMNS, max(2, exemplars))
        self.row_height = self.tile_height + TILE + GAP / 2 + LINE * (lines + 0.7) + GAP
        self.width = 2 * MARGIN + self.columns * (TILE + GAP) - GAP
        self.height = HEADLINE + MARGIN / 2 + -(-exemplars // self.columns) * self.row_height
        self.figure = Figure(figsize=(self.width, self.height), dpi=DOTS_PER_INCH, facecolor="white")

    def place(self, index: int) -> tuple[float, float]:
        """Left and top of an exemplar, counted row by row."""
        row, column = divmod(index, self.columns)
        return MARGIN + column * (TILE + GAP), HEADLINE + row * self.row_height

    def show(self, left: float, top: float, tile: np.ndarray) -> None:
        """A tile at a place, as wide as all are."""
        height = TILE * tile.shape[0] / tile.shape[1]
        place = (left / self.width, 1 - (top + height) / self.height, TILE / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.imshow(tile, interpolation="none", aspect="auto")
        axes.axis("off")

    def write(
        self, left: float, middle: float, text: str, room: float, *, size: float, colour: str, bold: bool = False
    ) -> None:
        """A line of text, cut where it is wider than its room."""
        self.figure.text(
            left / self.width,
            1 - middle / self.height,
            plain(shortened(text, room, size / POINTS_PER_INCH, bold=bold)),
            fontsize=size,
            fontweight="bold" if bold else "normal",
            fontfamily="DejaVu Sans",
            color=colour,
            va="center",
        )
