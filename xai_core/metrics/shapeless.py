"""Maps that say nothing: each reason by name, with the images ``[B]`` to which it applies."""

from __future__ import annotations

import torch
from torch import Tensor


def not_finite(maps: Tensor, subject: str = "the map") -> dict[str, Tensor]:
    """Which maps ``[B, ...]`` hold NaN or infinity."""
    return {f"{subject} is not finite": ~maps.flatten(1).isfinite().all(dim=1)}


def constant(maps: Tensor, subject: str = "the map", known: Tensor | None = None) -> dict[str, Tensor]:
    """Which maps ``[B, ...]`` are the same everywhere (where ``known``): they rank nothing."""
    return {f"{subject} is constant": ~varies(maps.flatten(1), None if known is None else known.flatten(1))}


def zero(maps: Tensor, subject: str = "the map") -> dict[str, Tensor]:
    """Which maps ``[B, ...]`` are zero everywhere: they have no size."""
    return {f"{subject} is zero": ~(maps.flatten(1) != 0).any(dim=1)}


def varies(values: Tensor, known: Tensor | None = None) -> Tensor:
    """Where rows ``[B, n]`` hold at least two different numbers (where ``known``); NaN counts for nothing."""
    if not values.shape[1]:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    unknown = values.isnan() if known is None else values.isnan() | ~known
    highest = values.masked_fill(unknown, -torch.inf).amax(dim=1)
    lowest = values.masked_fill(unknown, torch.inf).amin(dim=1)
    return highest > lowest
