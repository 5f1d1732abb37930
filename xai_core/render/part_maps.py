"""Parts over their picture: in distinct colours, or coloured by their scores; white lines between them."""

from __future__ import annotations

import numpy as np

from xai_core.parts.labels import NO_PART
from xai_core.render.heat_maps import colours, is_signed
from xai_core.render.overlays import OPACITY, blend, fade, require_same_size

# Paul Tol's "bright" and "muted" schemes without their greys: distinct for all common kinds of colour vision.
DISTINCT = (
    "4477aa ee6677 228833 ccbb44 66ccee aa3377 332288 ddcc77 117733 88ccee 882255 44aa99 999933 cc6677 aa4499"
)

NO_PART_FADE = 1.0


def part_colours(count: int) -> np.ndarray:
    """Colours of parts 0 .. count - 1, uint8 ``[count, 3]``; past 15 they come again, lighter and lighter."""
    base = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in DISTINCT.split()], np.float64)
    index = np.arange(count)
    lighter = (0.35 * (index // len(base)) % 0.9)[:, None]
    return np.rint(base[index % len(base)] * (1.0 - lighter) + 255.0 * lighter).astype(np.uint8)


def borders(labels: np.ndarray, width: int | None = None) -> np.ndarray:
    """Pixels at the seams of parts: bool ``[H, W]``; by default one pixel wide for every 200 of the picture."""
    seam = np.zeros(labels.shape, bool)
    reach = max(1, round(max(labels.shape) / 200)) if width is None else width
    for shift in range(1, reach + 1):
        seam[:, :-shift] |= labels[:, :-shift] != labels[:, shift:]
        seam[:-shift, :] |= labels[:-shift, :] != labels[shift:, :]
    return seam


def part_map(picture: np.ndarray, labels: np.ndarray, *, opacity: float = 0.55) -> np.ndarray:
    """Every part in a colour of its own over the picture; what is in no part is grey.

    Args:
        picture: uint8 ``[H, W, 3]``; labels: integers ``[H, W]``, 255 where there is no part.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        UsageError: picture and labels of different sizes.
    """
    require_same_size(picture, labels, "part map")
    table = np.zeros((NO_PART + 1, 3))
    table[:NO_PART] = part_colours(NO_PART)
    inside = labels != NO_PART
    below = np.where(inside[..., None], picture, fade(picture, NO_PART_FADE))
    return _with_borders(blend(below, table[labels], opacity * inside), labels)


def scored_parts(
    picture: np.ndarray, labels: np.ndarray, scores: np.ndarray, *, signed: bool | None = None
) -> np.ndarray:
    """Every part in the colour of its score; parts without a score (NaN) stay faded.

    Args:
        picture: uint8 ``[H, W, 3]``; labels: ``[H, W]``, 255 where there is no part; scores: ``[K]``.

    Returns:
        uint8 ``[H, W, 3]``; the largest magnitude has the full colour.

    Raises:
        UsageError: picture and labels of different sizes.
    """
    require_same_size(picture, labels, "part map")
    chosen = is_signed(scores) if signed is None else signed
    table = np.zeros(NO_PART + 1)
    table[: len(scores)] = np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    largest = np.abs(table).max()
    relative = table / largest if largest > 0 else table
    strengths = np.clip(relative, -1.0 if chosen else 0.0, 1.0)[labels]
    painted = blend(fade(picture), colours(strengths, signed=chosen), OPACITY * np.abs(strengths))
    return _with_borders(painted, labels)


def _with_borders(painted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    painted[borders(labels)] = 255
    return painted
