"""All metrics of one method's maps in one go, so that nothing is forwarded twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.batching import join_rows
from xai_core.errors import UsageError
from xai_core.metrics.curves import defined
from xai_core.metrics.trajectory import Curve, Trajectory, follow, rank_parts, rank_pixels
from xai_core.models import Classifier
from xai_core.registry import MetricEntry, variant_id


@dataclass(frozen=True)
class Evaluation:
    """Metric values ``[B]`` by id (NaN: undefined) and the curves they were read from, by curve id.

    ``broken`` ``[B]`` by metric says where a value is defined and yet NaN or infinite: the model gave no
    probability for a perturbed image, or the metric is wrong. Such a value says nothing and is not "undefined".
    """

    values: dict[str, Tensor]
    curves: dict[str, Curve]
    broken: dict[str, Tensor]


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
    values, broken = {}, {}
    for entry, options in metrics:
        name = variant_id(entry.name, options)
        value = entry.function(curves, options)
        known = _known(entry, options, meaningful, value)
        values[name] = torch.where(known, value, torch.nan)
        broken[name] = known & ~value.isfinite()
    return Evaluation(values, {one.name: _blank(curve, meaningful[one]) for one, curve in curves.items()}, broken)


def join_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of several batches, by the same metrics, as that of one."""
    first = evaluations[0]
    return Evaluation(
        values={name: torch.cat([one.values[name] for one in evaluations]) for name in first.values},
        curves={
            name: Curve(
                join_rows([one.curves[name].fraction for one in evaluations]),
                join_rows([one.curves[name].prob for one in evaluations]),
            )
            for name in first.curves
        },
        broken={name: torch.cat([one.broken[name] for one in evaluations]) for name in first.broken},
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


def _known(entry: MetricEntry, options: Any, meaningful: dict[Trajectory, Tensor], value: Tensor) -> Tensor:
    """Where a metric is defined: all its trajectories follow a ranking that means something."""
    known = torch.ones_like(value, dtype=torch.bool)
    for trajectory in entry.trajectories(options):
        known = known & meaningful[trajectory]
    return known


def _blank(curve: Curve, meaningful: Tensor) -> Curve:
    """A curve of an undefined ranking is no curve."""
    return Curve(curve.fraction, torch.where(meaningful.view(-1, 1), curve.prob, torch.nan))
