"""Labelled pictures batch by batch, and what an objective measures over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.training.modes import training_modes
from xai_core.training.objective import Objective
from xai_core.training.recipe import Recipe

#: Pictures ``[N, 3, H, W]`` in uint8 that a list of rows picks from, and labels ``[N]``.
Pictures = Any
LabelledPictures = tuple[Pictures, Tensor]


def evaluate(
    objective: Objective, given: LabelledPictures, recipe: Recipe, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """The means of what an objective measures over pictures, as they are, in the recipe's batches and precision.

    Raises:
        UsageError: there is no ``score`` among it.
    """
    pictures, labels = matched(*given, "pictures")
    device = torch.device(device)
    size, found = recipe.batch_size, []
    objective.trained.eval()
    with training_modes(recipe.precision, device):
        for start in range(0, len(labels), size):
            rows = list(range(start, min(start + size, len(labels))))
            batch = picked(pictures, rows, device).float() / 255
            found.append(objective.measure(batch, labels[rows].to(device)))
    if "score" not in found[0]:
        raise UsageError(f"measure: expected 'score' among it, got {', '.join(found[0]) or 'nothing'}")
    return {name: float(torch.cat([one[name] for one in found]).double().mean()) for name in sorted(found[0])}


def matched(pictures: Pictures, labels: Tensor, what: str) -> LabelledPictures:
    """Pictures with their labels on the CPU.

    Raises:
        UsageError: there are none, or not as many of both; ``what`` names them.
    """
    labels = torch.as_tensor(labels).cpu()
    if not len(labels) or len(pictures) != len(labels):
        raise UsageError(
            f"{what}: expected at least one picture and a label for each, got {len(pictures)} pictures and "
            f"{len(labels)} labels"
        )
    return pictures, labels


def picked(pictures: Pictures, rows: Sequence[int], device: torch.device) -> Tensor:
    """Some rows of the pictures on a device, in their order."""
    return torch.as_tensor(pictures[rows]).to(device)
