"""Methods that learn something from data before they explain: what they are given, and how they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.attribution.interface import check_request, fitting_entry
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.precision import Precision, own_modes
from xai_core.registry import methods


@dataclass(frozen=True)
class FitSamples:
    """What a method is fitted to.

    ``images`` ``[N, 3, H, W]`` normalised, ``targets`` ``[N]``, ``parts`` labels ``[N, H, W]`` or None, and a
    user's own pictures of each concept ``[n, 3, H, W]`` by name, or None.
    """

    images: Tensor
    targets: Tensor
    parts: Tensor | None = None
    concepts: Mapping[str, Tensor] | None = None


def fit_method(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    method: str,
    options: Any = None,
    parts: Tensor | None = None,
    concepts: Mapping[str, Tensor] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    precision: Precision = "fp32",
) -> dict[str, Tensor]:
    """What a method learns from pictures: the ``fitted`` of ``attribute``, ``attribute_classes``, ``score_parts``.

    Args:
        images: normalised inputs ``[N, 3, H, W]``; targets: class indices ``[N]``; parts: labels ``[N, H, W]``.
        concepts: a user's own pictures of each concept, normalised ``[n, 3, H, W]``, by name, for a method that
            takes them; those under ``random`` are examples of no concept.
        seed: of everything random; the others as in :func:`~xai_core.attribution.attribute`.

    Returns:
        Named tensors on the CPU.

    Raises:
        UsageError: a method that learns nothing, samples that it cannot learn from, or what ``attribute`` refuses.
        NotFinite: an input holds NaN or infinity.
    """
    entry = methods.get(method)
    chosen = check_request(entry, model, images, targets.view(-1, 1), options, precision)
    found = fitting_entry(entry, chosen)
    if found is None:
        raise UsageError(f"{method!r} learns nothing from data: call attribute without fitting it")
    learner, learner_options = found
    if not len(images):
        raise UsageError(f"{method!r} learns from images: expected at least 1, got none")
    samples = FitSamples(images, targets, parts, concepts)
    with own_modes(precision, model.device):
        assert learner.fit is not None
        state = learner.fit(model, samples, learner_options, batch_size, seed)
    return {name: torch.as_tensor(values).detach().cpu().contiguous() for name, values in state.items()}
