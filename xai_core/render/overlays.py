"""Heat over its picture: the stronger, the less of the picture shows through."""

from __future__ import annotations

import numpy as np

from xai_core.errors import UsageError
from xai_core.render.heat_maps import colours, is_signed, strength

# How far the picture is faded to grey, so that its own colours are not mistaken for heat.
FADE = 0.6

# Of the strongest pixels: the picture still shows through them.
OPACITY = 0.72


def overlay(
    picture: np.ndarray, values: np.ndarray, *, signed: bool | None = None, opacity: float = OPACITY
) -> np.ndarray:
    """A map laid over its picture; where it is 0 the faded picture shows.

    Args:
        picture: uint8 ``[H, W, 3]``; values: ``[H, W]``.
        signed: use the diverging palette; by default the map's own values decide.
        opacity: of the strongest pixels, in [0, 1].

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        UsageError: picture and map of different sizes.
    """
    require_same_size(picture, values, "map")
    chosen = is_signed(values) if signed is None else signed
    strengths = strength(values, signed=chosen)
    return blend(fade(picture), colours(strengths, signed=chosen), opacity * np.abs(strengths))


def fade(picture: np.ndarray, amount: float = FADE) -> np.ndarray:
    """A picture mixed with its own grey: float64 ``[H, W, 3]``."""
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return (1.0 - amount) * picture + amount * grey[..., None]


def blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
    """``above`` over ``below`` with opacity ``alpha`` (``[H, W]`` or one number): uint8 ``[H, W, 3]``."""
    weight = np.asarray(alpha)[..., None]
    return np.rint(np.clip(weight * above + (1.0 - weight) * below, 0, 255)).astype(np.uint8)


def require_same_size(picture: np.ndarray, plane: np.ndarray, what: str) -> None:
    """Refuses a plane that does not cover its picture.

    Raises:
        UsageError: naming both shapes.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or plane.shape != picture.shape[:2]:
        raise UsageError(
            f"render: expected a picture [H, W, 3] and a {what} [H, W] of the same size, "
            f"got {picture.shape} and {plane.shape}"
        )
