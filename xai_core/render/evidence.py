"""The evidence of a receptive field: the smallest region that holds a share of it, outlined in its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xai_core.errors import UsageError
from xai_core.render.overlays import blend, fade

# Of the mass of a receptive field that the outlined region holds.
SHARE = 0.5

# Of the picture's longer side: attributions by pixel are speckled, and a region of specks outlines nothing.
SMOOTHING = 1 / 56

# Of the picture's shorter side: a crop shows no less, or nobody sees what it was cut from.
SMALLEST_CROP = 0.4

# Around the region in a crop, as a share of the region's own extent.
CROP_MARGIN = 0.15

# Of the region's mass: islands beyond it are outlined, and the crop does not stretch to them.
CROP_SHARE = 0.8

# How far what is no evidence is dimmed, and how much of its colour it loses.
DIM = 0.3
FADE = 0.45

OUTLINE = (255, 214, 64)
MARK = (255, 255, 255)
CASING = (16, 18, 24)

# In pixels of the drawn tile: the outline, the mark, the dark casing on both sides of each; and the least mark.
OUTLINE_WIDTH = 2.0
MARK_WIDTH = 2.0
CASING_WIDTH = 1.0
SMALLEST_MARK = 9.0


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture, in its pixels: rows ``top`` to ``bottom``, columns ``left`` to ``right``."""

    top: float
    left: float
    bottom: float
    right: float


def spread(field: np.ndarray, size: tuple[int, int], smoothing: float = SMOOTHING) -> np.ndarray:
    """A receptive field over the pixels of its picture: bilinear, its negative part dropped, smoothed.

    Args:
        field: ``[r, c]`` at any resolution; what is negative or not finite is no evidence for the scalar.
        size: of the picture; smoothing: the Gaussian's standard deviation as a share of the longer side.

    Returns:
        ``[H, W]`` float64 in units of the field's largest value, nowhere negative.
    """
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    evidence = np.clip(np.nan_to_num(np.asarray(field, np.float64), nan=0.0, posinf=0.0, neginf=0.0), 0.0, None)
    # Pictures of numbers have single precision: tiny and huge fields keep theirs as shares of the largest value.
    relative = evidence / (evidence.max() or 1.0)
    resized = Image.fromarray(relative.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(gaussian_filter(np.asarray(resized, np.float64), smoothing * max(size), mode="nearest"))


def level_of(evidence: np.ndarray, share: float = SHARE) -> float:
    """The level above which the smallest region lies that holds ``share`` of the evidence ``[H, W]``.

    Pixels at the level itself belong to the region, all of them: which of equal ones come first is chance.
    Infinite where there is no evidence.

    Raises:
        UsageError: a share that is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise UsageError(f"share: expected a number above 0 and at most 1, got {share}")
    ordered = np.sort(evidence, axis=None)[::-1]
    held = np.cumsum(ordered)
    if not held[-1] > 0:
        return float("inf")
    return float(ordered[min(np.searchsorted(held, share * held[-1]), len(ordered) - 1)])


def crop_window(evidence: np.ndarray, level: float) -> Window:
    """A square window around the evidence at or above a level, inside the picture where the picture allows it.

    The whole picture where there is no evidence; small islands (see ``CROP_SHARE``) may lie outside.
    """
    from scipy.ndimage import label

    height, width = evidence.shape
    islands, count = label(evidence >= level)
    if not count:
        return Window(0, 0, height, width)
    mass = np.bincount(islands.ravel(), evidence.ravel(), count + 1)[1:]
    order = np.argsort(-mass, kind="stable")
    needed = int(np.searchsorted(np.cumsum(mass[order]), CROP_SHARE * mass.sum())) + 1
    rows, columns = np.nonzero(np.isin(islands, 1 + order[:needed]))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    side = min(max(extent * (1 + 2 * CROP_MARGIN), SMALLEST_CROP * min(height, width)), height, width)
    top, left = (
        float(np.clip((ends.min() + ends.max() + 1 - side) / 2, 0, whole - side))
        for ends, whole in ((rows, height), (columns, width))
    )
    return Window(top, left, top + side, left + side)


def evidence_tile(
    picture: np.ndarray,
    evidence: np.ndarray,
    level: float,
    window: Window,
    side: int,
    cell: Window | None = None,
    *,
    lines: bool = True,
) -> np.ndarray:
    """A window of a picture as a tile: evidence outlined, the rest dimmed, the vector's position marked.

    Args:
        picture: ``[H, W, 3]`` in [0, 255]; evidence: ``[H, W]``, see :func:`spread`; level: see
            :func:`level_of`.
        side: the tile's width in pixels; its height follows from the window.
        cell: what the vector stands for, None where it has no position; lines: draw it, and the outline.

    Returns:
        uint8 ``[h, side, 3]``.
    """
    height = max(1, round(side * (window.bottom - window.top) / (window.right - window.left)))
    shown = np.clip(_cut(picture, window, (height, side)), 0, 255)
    region = _cut(evidence[..., None], window, (height, side))[..., 0] >= level
    tile = np.where(region[..., None], shown, (1 - DIM) * fade(shown, FADE))
    strokes = [(_distance(region), OUTLINE, OUTLINE_WIDTH)]
    if cell is not None:
        strokes.append((_distance_to(cell, window, (height, side)), MARK, MARK_WIDTH))
    for distance, colour, width in strokes if lines else ():
        tile = _stroke(tile, distance, CASING, width + 2 * CASING_WIDTH)
        tile = _stroke(tile, distance, colour, width)
    return np.rint(tile).astype(np.uint8)


def _cut(planes: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of planes ``[H, W, c]`` at another size."""
    from PIL import Image

    box = (window.left, window.top, window.right, window.bottom)
    kind = Image.Resampling.LANCZOS if planes.shape[-1] == 3 else Image.Resampling.BILINEAR
    cut = [
        np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], kind, box=box), np.float64)
        for plane in np.moveaxis(planes, -1, 0)
    ]
    return np.stack(cut, axis=-1)


def _distance(region: np.ndarray) -> np.ndarray:
    """How far each pixel is from the region's edge; the tile's own edge is none."""
    from scipy.ndimage import distance_transform_edt

    if region.all() or not region.any():
        return np.full(region.shape, np.inf)
    outside, inside = distance_transform_edt(~region), distance_transform_edt(region)
    return np.asarray(np.where(region, inside, outside) - 0.5)


def _distance_to(cell: Window, window: Window, size: tuple[int, int]) -> np.ndarray:
    """How far each pixel of a tile is from the edge of a rectangle, which is drawn no smaller than can be seen."""
    scale = size[0] / (window.bottom - window.top)
    spans = (
        (cell.top - window.top, cell.bottom - window.top),
        (cell.left - window.left, cell.right - window.left),
    )
    across = []
    for count, (first, last) in zip(size, spans, strict=True):
        half = max((last - first) * scale, SMALLEST_MARK) / 2
        middle = (first + last) / 2 * scale
        low, high = _inside(middle - half, count), _inside(middle + half, count)
        across.append(np.abs(np.arange(count) + 0.5 - (low + high) / 2) - (high - low) / 2)
    return np.abs(np.maximum(across[0][:, None], across[1][None, :]))


def _inside(edge: float, count: int) -> float:
    """An edge that falls on the border of a tile, moved in as far as its line is wide; others as they are."""
    inset = MARK_WIDTH / 2 + CASING_WIDTH
    for border, moved in ((0.0, inset), (float(count), count - inset)):
        if abs(edge - border) < inset:
            return moved
    return edge


def _stroke(tile: np.ndarray, distance: np.ndarray, colour: Sequence[int], width: float) -> np.ndarray:
    """A line of a width where a distance is 0, with soft edges."""
    return blend(tile, np.array(colour, np.float64), np.clip(width / 2 + 0.5 - distance, 0.0, 1.0)).astype(
        np.float64
    )
