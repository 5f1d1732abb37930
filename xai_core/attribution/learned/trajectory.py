"""Deletion and insertion along a relaxed order: areas that a gradient can improve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from xai_core.attribution.learned.sinkhorn import hard_order
from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.metrics.trajectory import removed_pixels
from xai_core.models import Classifier


@dataclass(frozen=True)
class Term:
    """One area of the loss: ``image`` deletes towards the baseline, ``baseline`` inserts over it; its sign."""

    start: Literal["image", "baseline"]
    baseline: Baseline
    sign: float


@dataclass(frozen=True)
class Scene:
    """What trajectories run between, once for a batch.

    ``clean``: images ``[B, 3, H, W]``, with their target's probability ``[B]``; ``ends``: that of each baseline.
    """

    model: Classifier
    targets: Tensor
    clean: tuple[Tensor, Tensor]
    ends: dict[Baseline, tuple[Tensor, Tensor]]


def strata(count: int, steps: int) -> Tensor:
    """How many of so many regions are taken at each step, ``[T]``: the metrics' own portions, none empty."""
    portions = removed_pixels(count, steps).diff()
    return portions[portions > 0]


def shares(order: Tensor) -> Tensor:
    """How much of each region is taken at the inner steps: ``[B, m - 1, n]`` of an order ``[B, m, n]``."""
    return order[:, :-1].cumsum(dim=1)


def hard_shares(scores: Tensor, steps: int) -> Tensor:
    """The shares, 0 or 1, of the scores' own order ``[B, n]``."""
    return shares(hard_order(scores, strata(scores.shape[1], steps)))


def make_scene(
    model: Classifier, images: Tensor, targets: Tensor, terms: Sequence[Term], passes: int, logits: Tensor | None
) -> Scene:
    """The ends of all terms' trajectories; ``logits`` of the images where they are known already."""
    target = targets.view(-1, 1)

    def probability(pictures: Tensor) -> Tensor:
        return torch.cat(
            run_batches(lambda rows: _probability(model(pictures[rows]), target[rows]), len(pictures), passes)
        )

    with torch.no_grad():
        clean = probability(images) if logits is None else _probability(logits, target)
        baselines = {term.baseline: make_baseline(term.baseline, model, images) for term in terms}
        ends = {baseline: (pictures, probability(pictures)) for baseline, pictures in baselines.items()}
    return Scene(model, targets, (images, clean), ends)


def areas(scene: Scene, taken: Tensor, terms: Sequence[Term], passes: int) -> Tensor:
    """The terms' areas ``[B, len(terms)]`` under the target's probability, as the metrics define them.

    Trapezoids over the fraction of pixels, both ends kept (``deletion`` and ``insertion``).

    Args:
        taken: share of each region that is replaced (or revealed) at the inner steps, ``[B, S, h, w]``, nearest
            pixels; the areas' gradient reaches it, and nothing else.
        passes: the most pictures in one pass of the model, with its gradient: what bounds memory.
    """
    images, inner = len(taken), taken.shape[1]
    kinds = [scene.clean, *scene.ends.values()]
    place = {baseline: number for number, baseline in enumerate(scene.ends, start=1)}
    route = [(0, place[term.baseline]) if term.start == "image" else (place[term.baseline], 0) for term in terms]
    pictures = torch.stack([one for one, _ in kinds])
    ends = torch.stack([probability for _, probability in kinds])
    first, last = torch.tensor(route, device=taken.device).T

    def build(pairs: Tensor, share: Tensor) -> Tensor:
        owner, term = pairs // (len(terms) * inner), pairs // inner % len(terms)
        return torch.lerp(pictures[first[term], owner], pictures[last[term], owner], share)

    spread = taken.unsqueeze(1).expand(-1, len(terms), -1, -1, -1).flatten(0, 2)
    owners = torch.arange(len(spread), device=taken.device) // (len(terms) * inner)
    along = _Probability.apply(spread, scene, build, owners, passes).view(images, len(terms), inner)
    curve = torch.cat([ends[first].T.unsqueeze(2), along, ends[last].T.unsqueeze(2)], dim=2)
    return torch.trapezoid(curve, _fractions(taken, pictures.shape[-2:]).to(curve).unsqueeze(1), dim=2)


def _fractions(taken: Tensor, size: Sequence[int]) -> Tensor:
    """The fraction of all pixels that is taken at each step, ``[B, S + 2]`` with both ends.

    Where regions do not divide the picture some have more pixels than others, so the fraction is the order's.
    """
    height, width = taken.shape[-2:]
    numbers = torch.arange(height * width, dtype=torch.float64, device=taken.device).view(1, 1, height, width)
    owner = _enlarged(numbers, size).flatten().long()
    pixels = torch.bincount(owner, minlength=height * width).view(height, width).to(taken)
    inner = (taken * pixels).sum(dim=(2, 3)) / len(owner)
    return torch.cat([torch.zeros_like(inner[:, :1]), inner, torch.ones_like(inner[:, :1])], dim=1)


def _enlarged(regions: Tensor, size: Sequence[int]) -> Tensor:
    """Regions ``[B, 1, h, w]`` to their pixels: each pixel belongs to the nearest."""
    return F.interpolate(regions, size=tuple(size), mode="nearest")


class _Probability(torch.autograd.Function):
    """The target's probability on pictures, each made by one share map; every map's gradient is taken at once.

    A picture's probability depends on its own map alone, so the gradients ``[P, h, w]`` are all there is to keep:
    the passes' graphs are gone when the next ones begin.
    """

    @staticmethod
    def forward(context: Any, maps: Tensor, scene: Scene, build: Any, owners: Tensor, passes: int) -> Tensor:
        wanted = context.needs_input_grad[0]

        size = scene.clean[0].shape[-2:]

        def passed(rows: slice) -> tuple[Tensor, Tensor | None]:
            pairs = torch.arange(rows.start, rows.stop, device=maps.device)
            with torch.set_grad_enabled(wanted):
                leaf = maps[rows].detach().requires_grad_(wanted)
                share = _enlarged(leaf.unsqueeze(1), size)
                found = _probability(scene.model(build(pairs, share)), scene.targets[owners[rows]].view(-1, 1))
                gradient = torch.autograd.grad(found.sum(), leaf)[0] if wanted else None
            return found.detach(), gradient

        found = run_batches(passed, len(maps), passes)
        if wanted:
            context.save_for_backward(torch.cat([gradient for _, gradient in found if gradient is not None]))
        return torch.cat([probability for probability, _ in found])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = context.saved_tensors
        return gradient.view(-1, 1, 1).to(slopes) * slopes, None, None, None, None


def _probability(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.double().softmax(dim=1).gather(1, targets).squeeze(1)
