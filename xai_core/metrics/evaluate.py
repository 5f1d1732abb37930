"""All metrics of one method's maps in one go, so that nothing is forwarded twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.curves import defined
from xai_core.metrics.trajectory import Curve, Trajectory, follow, rank_parts, rank_pixels
from xai_core.models import Classifier
from xai_core.registry import MetricEntry, variant_id


@dataclass(frozen=True)
class Evaluation:
    """Metric values ``[B]`` by id (NaN: undefined) and the curves they were read from, by curve id."""

    values: dict[str, Tensor]
    curves: dict[str, Curve]


def evaluate(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    parts: Tensor,
    metrics: Sequence[tuple[MetricEntry, Any]],
    *,
    part_scores: Tensor | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Evaluates pixel maps ``[B, H, W]``; part methods give their ``part_scores`` ``[B, K]`` as well.

    Trajectories that several metrics share are followed once.

    Raises:
        UsageError: maps or parts of another size than the images.
    """
    expected = (len(images), *images.shape[-2:])
    for name, got in (("maps", maps), ("parts", parts)):
        if tuple(got.shape) != expected:
            raise UsageError(f"metrics: expected {name} of shape {expected}, got {tuple(got.shape)}")
    parts = parts.to(images.device).long()
    maps = maps.to(images.device)
    scores = mean_inside_parts(maps, parts) if part_scores is None else part_scores.to(images.device).double()
    wanted = list(dict.fromkeys(one for entry, options in metrics for one in entry.trajectories(options)))
    rankings = {"pixels": rank_pixels(maps.nan_to_num()), "parts": rank_parts(scores, parts)}
    curves = follow(model, images, targets, rankings, wanted, batch_size)
    meaningful = {one: defined(one, maps, scores) for one in wanted}
    return Evaluation(
        values={
            variant_id(entry.name, options): _value(entry, options, curves, meaningful)
            for entry, options in metrics
        },
        curves={one.name: _blank(curve, meaningful[one]) for one, curve in curves.items()},
    )


def mean_inside_parts(maps: Tensor, parts: Tensor) -> Tensor:
    """Part scores of a pixel map: its mean inside each part (KL-Hessian eq. 14).

    Args:
        maps: ``[B, H, W]``; parts: labels ``[B, H, W]``, 255 where there is no part.

    Returns:
        ``[B, K]`` float64, NaN where an image has no such part.
    """
    labels = parts.flatten(1).long()
    table = torch.zeros(len(maps), 256, dtype=torch.float64, device=maps.device)
    total = table.scatter_add(1, labels, maps.flatten(1).double())
    area = table.scatter_add(1, labels, torch.ones_like(labels, dtype=torch.float64))
    present = (area[:, :255] > 0).any(dim=0).nonzero()
    count = int(present.max()) + 1 if len(present) else 0
    return total[:, :count] / torch.where(area[:, :count] > 0, area[:, :count], torch.nan)


def _value(
    entry: MetricEntry, options: Any, curves: dict[Trajectory, Curve], meaningful: dict[Trajectory, Tensor]
) -> Tensor:
    value = entry.function(curves, options)
    for trajectory in entry.trajectories(options):
        value = torch.where(meaningful[trajectory], value, torch.nan)
    return value


def _blank(curve: Curve, meaningful: Tensor) -> Curve:
    """A curve of an undefined ranking is no curve."""
    return Curve(curve.fraction, torch.where(meaningful.view(-1, 1), curve.prob, torch.nan))
