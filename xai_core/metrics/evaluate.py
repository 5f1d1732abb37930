"""All metrics of one method's maps in one go: what several read is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.batching import join_rows
from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.trajectory import Curve
from xai_core.precision import own_modes
from xai_core.registry import MetricEntry, variant_id


@dataclass(frozen=True)
class Evaluation:
    """Metric values ``[B]`` by id (NaN: undefined) and the curves they were read from, by curve id.

    ``reasons`` say by id why an image has no value, None where it has one. ``broken`` ``[B]`` by id says where a
    value is defined and yet NaN or infinite: the model gave no probability for a perturbed image, or the metric is
    wrong. Such a value says nothing and is not "undefined".
    """

    values: dict[str, Tensor]
    reasons: dict[str, tuple[str | None, ...]]
    curves: dict[str, Curve]
    broken: dict[str, Tensor]


def evaluate(evidence: Evidence, metrics: Sequence[tuple[MetricEntry, Any]]) -> Evaluation:
    """Measures explained images by metrics, each an entry with its options.

    The caller's own autocast, gradient and inference modes have no effect.

    Raises:
        UsageError: a metric needs what the evidence does not hold.
    """
    for entry, options in metrics:
        _require(entry, options, evidence)
    values, reasons, broken = {}, {}, {}
    for entry, options in metrics:
        name = variant_id(entry.name, options)
        with own_modes("fp32", evidence.images.device):
            measured = entry.function(evidence, options)
        known = measured.defined
        values[name] = torch.where(known, measured.value.double(), torch.nan)
        reasons[name] = measured.reasons
        broken[name] = known & ~measured.value.isfinite()
    return Evaluation(values, reasons, evidence.curves, broken)


def join_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluations of several batches, by the same metrics, as that of one."""
    first = evaluations[0]
    return Evaluation(
        values={name: torch.cat([one.values[name] for one in evaluations]) for name in first.values},
        reasons={
            name: tuple(reason for one in evaluations for reason in one.reasons[name]) for name in first.reasons
        },
        curves={
            name: Curve(
                join_rows([one.curves[name].fraction for one in evaluations]),
                join_rows([one.curves[name].prob for one in evaluations]),
            )
            for name in first.curves
        },
        broken={name: torch.cat([one.broken[name] for one in evaluations]) for name in first.broken},
    )


#: What a metric can need beside the map: where the evidence holds it, and what gives it.
NEEDS = {
    "parts": (lambda evidence: evidence.parts, "part labels: give Evidence its parts"),
    "mask": (
        lambda evidence: evidence.truth.mask,
        "masks of objects: give Evidence a Truth with a mask",
    ),
    "effects": (
        lambda evidence: evidence.truth.effects,
        "true effects of parts, which are known of demo pictures alone",
    ),
    "explainer": (lambda evidence: evidence.explainer, "the method itself: give Evidence an Explainer"),
}


def _require(entry: MetricEntry, options: Any, evidence: Evidence) -> None:
    for need in entry.all_needs(options):
        held, remedy = NEEDS[need]
        if held(evidence) is None:
            raise UsageError(f"metric {entry.name!r} needs {remedy}")
