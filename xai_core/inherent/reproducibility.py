"""How far importance varies from one training to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xai_core.errors import UsageError


def deviations(runs: Sequence[Tensor]) -> Tensor:
    """Of every picture ``[N]`` how far its importance varies from one training's seed to another's (equation 3).

    Args:
        runs: importance ``[N, h, w]`` of the same pictures, one tensor a training, at least two. The standard
            deviation has n - 1 in its denominator, as the metric ``reproducibility``; the mean is over patches.

    Raises:
        UsageError: a single training, or importance of other pictures or patches.
    """
    shapes = {tuple(run.shape) for run in runs}
    if len(runs) < 2 or len(shapes) != 1:
        raise UsageError(
            f"reproducibility: expected the importance of the same patches from at least 2 trainings, got "
            f"{len(runs)} of shapes {sorted(shapes)}"
        )
    return torch.stack([run.double() for run in runs]).std(dim=0).flatten(1).mean(dim=1)


def reproducibility(runs: Sequence[Tensor]) -> float:
    """r (equation 3): the mean of :func:`deviations` over the pictures."""
    return float(deviations(runs).mean())
