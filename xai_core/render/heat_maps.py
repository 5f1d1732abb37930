"""Attribution maps as colours, each map normalised by itself.

Signed maps get a diverging palette centred at 0 (blue against, red for), others a sequential one. Both
palettes keep their order for readers who do not tell red from green.
"""

from __future__ import annotations

import numpy as np

SEQUENTIAL = "inferno"
DIVERGING = "coolwarm"

# A few extreme pixels would otherwise leave the rest of a map without colour.
ROBUST_PERCENTILE = 99.0

# Interpolation leaves small negative rims around maps that have no sign; they do not make a map signed.
SIGN_TOLERANCE = 0.01


def is_signed(values: np.ndarray) -> bool:
    """Whether values below zero matter: past 1 % of what the map robustly reaches."""
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return bool(finite.size and finite.min() < -SIGN_TOLERANCE * _reach(np.abs(finite)))


def strength(values: np.ndarray, *, signed: bool | None = None) -> np.ndarray:
    """A map in its own robust units.

    Args:
        values: ``[H, W]``; what is not finite counts as 0.
        signed: treat it as signed; by default :func:`is_signed` decides.

    Returns:
        float64 ``[H, W]``. Signed: value / 99th percentile of the magnitudes, clipped to [-1, 1]. Else: 0 at
        the 1st and 1 at the 99th percentile, clipped to [0, 1]. A constant map says nothing: 0 everywhere.
    """
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if finite.size == 0 or finite.min() == finite.max():
        return np.zeros(finite.shape)
    if is_signed(finite) if signed is None else signed:
        return np.clip(finite / _reach(np.abs(finite)), -1.0, 1.0)
    floor = np.percentile(finite, 100.0 - ROBUST_PERCENTILE)
    return np.clip((finite - floor) / _reach(finite - floor), 0.0, 1.0)


def _reach(magnitudes: np.ndarray) -> float:
    """What becomes 1: the robust percentile, or the maximum of a map with very few values off zero."""
    robust = float(np.percentile(magnitudes, ROBUST_PERCENTILE))
    return robust if robust > 0 else float(magnitudes.max())


def colours(strengths: np.ndarray, *, signed: bool) -> np.ndarray:
    """Strengths as colours: uint8 ``[..., 3]``."""
    from matplotlib import colormaps

    position = (strengths + 1.0) / 2.0 if signed else strengths
    palette = colormaps[DIVERGING if signed else SEQUENTIAL]
    return np.asarray(palette(position, bytes=True)[..., :3])


def heat_map(values: np.ndarray, *, signed: bool | None = None) -> np.ndarray:
    """A map ``[H, W]`` as a colour picture, uint8 ``[H, W, 3]``; see :func:`strength`."""
    chosen = is_signed(values) if signed is None else signed
    return colours(strength(values, signed=chosen), signed=chosen)
