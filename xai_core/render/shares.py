"""A class's share of every pixel over its picture, on a scale that all classes of a picture have in common."""

from __future__ import annotations

import numpy as np

from xai_core.render.heat_maps import colours
from xai_core.render.overlays import OPACITY, blend, fade, require_same_size


def share_overlay(picture: np.ndarray, share: np.ndarray, chance: float) -> np.ndarray:
    """A share laid over its picture: nothing up to chance, the full colour at 1.

    Args:
        picture: uint8 ``[H, W, 3]``; share: ``[H, W]`` in [0, 1].
        chance: what equal shares would be, 1/K.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        UsageError: picture and share of different sizes.
    """
    require_same_size(picture, share, "share")
    strengths = np.clip((np.asarray(share, np.float64) - chance) / (1.0 - chance), 0.0, 1.0)
    # The root lets the shares that are little more than chance, which are most, be seen.
    return blend(fade(picture), colours(strengths, signed=False), OPACITY * np.sqrt(strengths))
