"""Interlayer concept insertion and deletion: which attribution finds the parents of a concept (iERF, VI-C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.concepts.coding import LASSO_PENALTY
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph.decomposition import NO_CONCEPT, Decomposition, decompose
from xai_core.concepts.graph.nodes import coefficients
from xai_core.concepts.graph.options import Attribution, check_penalty
from xai_core.concepts.graph.questions import Alignment
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.replay import network_between

STEPS = 20
#: Why a curve is NaN.
UNDEFINED = "with all concepts present the alignment with the target is not positive: nothing can be set to 1"


@dataclass(frozen=True)
class InterlayerCurves:
    """Curves of target concepts ``targets`` ``[B, T]`` while concepts of the source layer go or come.

    ``deletion``, ``insertion`` ``[B, T, steps + 1]``: the largest cosine with the target over positions, over that
    with all concepts present; ``deletion_area`` (lower is better) and ``insertion_area`` (higher is better)
    ``[B, T]``: their means by the trapezoidal rule. ``undefined`` ``[B, T]``: where all are NaN, and why is
    (:data:`UNDEFINED`).
    """

    targets: Tensor
    deletion: Tensor
    insertion: Tensor
    deletion_area: Tensor
    insertion_area: Tensor
    undefined: Tensor


def interlayer_curves(
    model: Classifier,
    images: Tensor,
    source: str,
    target: str,
    dictionaries: Mapping[str, Dictionary],
    attributions: Mapping[str, Mapping[str, Any] | None],
    *,
    targets: Tensor | int = 5,
    steps: int = STEPS,
    penalty: float = LASSO_PENALTY,
    batch_size: int = 32,
) -> dict[str, InterlayerCurves]:
    """Interlayer c-insertion and c-deletion of several attributions, on the same images and targets (iERF, VI-C1).

    All concepts that the image has in the source layer are taken away, or brought in, in descending order of their
    ICAT to the target, in ``steps`` groups of equal size up to rounding; each image and target has its own order.

    Args:
        images: ``[B, 3, H, W]``; attributions: names, with their options.
        targets: concepts of the target layer, ``[B, T]`` (-1 for none), or how many of each image: those with the
            largest coefficients, summed over positions.

    Raises:
        UsageError: an unknown attribution, or one that is not defined on the network; no step; as for
            :func:`~xai_core.concepts.graph.decomposition.decompose` and
            :func:`~xai_core.replay.network_between`.
    """
    if steps < 1 or not attributions:
        raise UsageError(
            f"expected at least 1 step and 1 attribution, got steps {steps} and attributions {list(attributions)}"
        )
    _check_layers(source, target, dictionaries)
    check_penalty(penalty, {layer: dictionaries[layer] for layer in (source, target)})
    _check_targets(targets, len(images), len(dictionaries[target].atoms))
    chosen = {name: Attribution.of(name, values) for name, values in attributions.items()}
    most = max(one.passes for one in chosen.values())

    def some(rows: slice) -> list[InterlayerCurves]:
        with torch.no_grad():
            between = network_between(model, images[rows].detach(), source, target)
        parent = decompose(model, between.activation, source, dictionaries[source], penalty=penalty)
        child = decompose(model, between.reached, target, dictionaries[target], penalty=penalty)
        concepts = _largest(child, targets) if isinstance(targets, int) else targets[rows]
        question = Alignment(model, parent, between, child, concepts)
        return [_measured(question, one, steps, batch_size) for one in chosen.values()]

    parts = run_batches(some, len(images), max(1, batch_size // most))
    return {name: _joined(one) for name, one in zip(chosen, zip(*parts, strict=True), strict=True)}


def _check_layers(source: str, target: str, dictionaries: Mapping[str, Dictionary]) -> None:
    missing = [layer for layer in (source, target) if layer not in dictionaries]
    if missing:
        raise UsageError(
            f"dictionaries: expected one for each layer, got none for {', '.join(missing)}; fit them first"
        )


def _check_targets(targets: Tensor | int, images: int, size: int) -> None:
    """Refuses what is no choice of concepts for each image."""
    if isinstance(targets, int):
        if targets < 1:
            raise UsageError(f"targets: expected at least 1 concept of the target layer, got {targets}")
    elif targets.ndim != 2 or len(targets) != images or not bool((targets < size).all()):
        raise UsageError(
            f"targets: expected concepts [{images}, T] below {size}, got {tuple(targets.shape)} up to "
            f"{int(targets.max())}"
        )


def _largest(child: Decomposition, count: int) -> Tensor:
    strength, concepts = coefficients(child).topk(min(count, child.codes.shape[2]), dim=1)
    return torch.where(strength > 0, concepts, NO_CONCEPT)


def _measured(question: Alignment, attribution: Attribution, steps: int, batch_size: int) -> InterlayerCurves:
    source = question.source
    # Only concepts of the image are asked about: the others have nothing to give, and Kernel SHAP counts players.
    active, there = _active(source)
    scores = attribution(question, torch.where(there, active, NO_CONCEPT), batch_size)
    ranked = scores.masked_fill(~there.unsqueeze(2), -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = active.unsqueeze(2).expand_as(ranked).gather(1, ranked)
    with torch.no_grad():
        whole, nothing = _ends(question, batch_size)
        inserted, deleted = _inner(question, order, there.sum(dim=1), steps, batch_size)
    insertion = torch.cat([nothing.unsqueeze(2), inserted, whole.unsqueeze(2)], dim=2)
    deletion = torch.cat([whole.unsqueeze(2), deleted, nothing.unsqueeze(2)], dim=2)
    undefined = (whole <= 0) | (question.concepts == NO_CONCEPT)
    insertion, deletion = (
        (curve / whole.unsqueeze(2)).masked_fill(undefined.unsqueeze(2), torch.nan)
        for curve in (insertion, deletion)
    )
    return InterlayerCurves(question.concepts, deletion, insertion, _area(deletion), _area(insertion), undefined)


def _active(source: Decomposition) -> tuple[Tensor, Tensor]:
    """Concepts ``[B, N]`` of each image, in the dictionary's order, and which places hold one."""
    active = source.active
    width = max(1, int(active.sum(dim=1).max()))
    concepts = active.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return concepts, active.gather(1, concepts)


def _ends(question: Alignment, batch_size: int) -> tuple[Tensor, Tensor]:
    """The largest cosines ``[B, T]`` with all concepts, and without any."""
    spread = question.source.spread

    def cosines(rows: slice) -> Tensor:
        flat = torch.arange(rows.start, rows.stop, device=spread.device)
        owners, present = flat // 2, (flat % 2 == 0).view(-1, 1, 1)
        return question.largest_cosines(question.source.offset + spread[owners] * present, owners)

    found = torch.cat(run_batches(cosines, 2 * len(spread), batch_size)).unflatten(0, (-1, 2))
    return found[:, 0], found[:, 1]


def _inner(
    question: Alignment, order: Tensor, counts: Tensor, steps: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The largest cosines ``[B, T, steps - 1]`` between the ends: inserted, deleted."""
    source, targets = question.source, question.count
    spread = source.spread
    if steps == 1:
        return (spread.new_zeros(len(spread), targets, 0),) * 2

    def curves(units: slice) -> Tensor:
        flat = torch.arange(units.start, units.stop, device=spread.device)
        image, target = flat // targets, flat % targets
        inserted = _cumulative(source, image, order[image, :, target], counts[image], steps)
        vectors = torch.stack([inserted, spread[image].unsqueeze(1) - inserted], dim=1) + source.offset
        rows = vectors.flatten(0, 2)
        each = len(rows) // len(flat)
        owners, wanted = image.repeat_interleave(each), target.repeat_interleave(each)

        def cosines(some: slice) -> Tensor:
            found = question.largest_cosines(rows[some], owners[some])
            return found.gather(1, wanted[some].unsqueeze(1)).squeeze(1)

        return torch.cat(run_batches(cosines, len(rows), batch_size)).view(len(flat), 2, steps - 1)

    each = 2 * (steps - 1)
    found = torch.cat(run_batches(curves, len(spread) * targets, max(1, batch_size // each)))
    both = found.unflatten(0, (len(spread), targets))
    return both[:, :, 0], both[:, :, 1]


def _cumulative(source: Decomposition, image: Tensor, order: Tensor, counts: Tensor, steps: int) -> Tensor:
    """What the first 1 .. steps - 1 groups of concepts put together, ``[u, steps - 1, P, C]``.

    Every concept is multiplied out once and the groups are then added up, whatever the number of steps.

    Args:
        image: ``[u]``; order: their concepts ``[u, N]``, the most important first; counts: how many they have.
    """
    start = torch.arange(steps + 1, device=order.device) * counts.unsqueeze(1) / steps
    start = start.ceil().long()
    width = max(1, int((start[:, 1:] - start[:, :-1]).max()))
    place = start[:, :-1].unsqueeze(2) + torch.arange(width, device=order.device)
    within = place < start[:, 1:].unsqueeze(2)
    concepts = order.gather(1, place.clamp(max=order.shape[1] - 1).flatten(1))
    codes = source.codes[image].gather(2, concepts.unsqueeze(1).expand(-1, source.codes.shape[1], -1))
    codes = codes * within.flatten(1).unsqueeze(1)
    with full_precision(codes.device):
        groups = codes.unflatten(2, (steps, width)).transpose(1, 2) @ source.atoms[concepts].unflatten(
            1, (steps, width)
        )
    return groups[:, :-1].cumsum(dim=1)


def _area(curves: Tensor) -> Tensor:
    return torch.trapezoid(curves, dim=2) / (curves.shape[2] - 1)


def _joined(parts: Sequence[InterlayerCurves]) -> InterlayerCurves:
    fields = [tuple(vars(part).values()) for part in parts]
    return InterlayerCurves(*(torch.cat(one) for one in zip(*fields, strict=True)))
