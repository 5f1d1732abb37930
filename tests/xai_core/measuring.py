"""Metrics by name over plain tensors, as the tests of metrics call them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xai_core.metrics import Evaluation, Evidence
from xai_core.metrics import evaluate as measure
from xai_core.models import Classifier
from xai_core.registry import build_options, metrics


def chosen(*names: str, **options: object) -> list:
    """Entries of these names, each with the same options."""
    return [(metrics.get(name), build_options(metrics.get(name), options)) for name in names]


def evaluate(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    parts: Tensor | None,
    wanted: list,
    **more: Any,
) -> Evaluation:
    """All that ``wanted`` metrics say of some maps; ``more`` goes to the evidence."""
    return measure(Evidence(model, images, targets, maps, parts=parts, **more), wanted)
