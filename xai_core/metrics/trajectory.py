"""The curve engine: perturbed images along a ranking, each distinct one forwarded once.

A trajectory replaces pixels (or whole parts) in the order of a ranking and follows the target's
probability. Perturbed batches are built on the device from a rank map, as one flat list of (image, step)
pairs; the clean image and the full baseline are shared by all trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.baselines import Baseline
from xai_core.parts.labels import NO_PART


@dataclass(frozen=True)
class Trajectory:
    """What is perturbed and how: most relevant first, towards the baseline or away from it.

    ``start``: ``image`` for deletion (pixels are replaced by the baseline), ``baseline`` for insertion
    (pixels are revealed). ``unit``: ``pixels`` in ``steps`` steps, or ``parts``, one part a step.
    """

    start: Literal["image", "baseline"]
    unit: Literal["pixels", "parts"]
    baseline: Baseline
    steps: int = 0

    @property
    def name(self) -> str:
        """The curve's id in the store; variants off the default carry them in brackets."""
        stem = {"image": "deletion", "baseline": "insertion"}[self.start]
        variant = [str(self.baseline)] if self.baseline != Baseline() else []
        if self.unit == "pixels" and self.steps != 50:
            variant.append(f"steps={self.steps}")
        prefix = "part_" if self.unit == "parts" else ""
        return f"{prefix}{stem}[{','.join(variant)}]" if variant else f"{prefix}{stem}"


@dataclass(frozen=True)
class Curve:
    """Probabilities of the target along a trajectory, steps 0 to T: both ``[B, T + 1]``.

    Rows of images with fewer parts than others end in NaN.
    """

    fraction: Tensor
    prob: Tensor


@dataclass(frozen=True)
class Rankings:
    """Position of every pixel in the order of removal, ``[B, H, W]``, and how many positions there are.

    Every pixel of a part has the part's position; pixels outside all parts go with the last one.
    """

    position: Tensor
    count: Tensor


def rank_pixels(maps: Tensor) -> Rankings:
    """Pixels by falling relevance; ties in index order (stable). Maps ``[B, H, W]``."""
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    position = torch.empty_like(order)
    position.scatter_(1, order, torch.arange(flat.shape[1], device=maps.device).expand_as(order))
    count = torch.full((len(maps),), flat.shape[1], device=maps.device)
    return Rankings(position.view(maps.shape), count)


def rank_parts(scores: Tensor, labels: Tensor) -> Rankings:
    """Parts by falling score; ties in label order. Scores ``[B, K]`` (NaN: no such part), labels ``[B, H, W]``."""
    present = ~scores.isnan()
    order = scores.nan_to_num(-torch.inf, -torch.inf, torch.inf).argsort(dim=1, descending=True, stable=True)
    # Absent parts hold no pixel, so where they fall in the order does not matter; they come last.
    position = torch.empty_like(order)
    position.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    count = present.sum(dim=1)
    last = (count - 1).clamp(min=0)
    table = torch.cat([position, last.view(-1, 1).expand(-1, NO_PART + 1 - scores.shape[1])], dim=1)
    return Rankings(table.gather(1, labels.flatten(1).long()).view(labels.shape), count)


def removed_pixels(pixels: int, steps: int) -> Tensor:
    """How many pixels are perturbed at steps 0..T: ``[T + 1]``.

    The counts are symmetric (n_t + n_{T-t} = all pixels), so that deletion of a map is exactly the reverse
    of insertion of its negative.
    """
    ahead = torch.arange(steps + 1) * pixels // steps
    return torch.where(torch.arange(steps + 1) * 2 <= steps, ahead, pixels - ahead.flip(0))


def follow(
    probability: Callable[[Callable[[slice], Tensor], Tensor], Tensor],
    images: Tensor,
    baseline: Tensor,
    ranking: Rankings,
    trajectory: Trajectory,
    clean: Tensor,
    replaced: Tensor,
) -> Curve:
    """The curve of one trajectory, all (image, step) pairs in one flat list.

    Args:
        probability: the target's probability on perturbed images: ``(build, owner) -> [n]``, where ``build`` gives
            the images of some rows and ``owner`` ``[n]`` says which image each comes from.
        images, baseline: ``[B, 3, H, W]``; clean, replaced: the probability on them, ``[B]``: the curve's ends.
    """
    thresholds = _thresholds(ranking, trajectory)
    fraction = thresholds / ranking.count.view(-1, 1)
    prob = torch.full_like(fraction, torch.nan)
    interior = (thresholds > 0) & (thresholds < ranking.count.view(-1, 1))
    owner, step = interior.nonzero(as_tuple=True)
    kept, replacement, first, last = images, baseline, clean, replaced
    if trajectory.start == "baseline":
        kept, replacement, first, last = baseline, images, replaced, clean

    def build(rows: slice) -> Tensor:
        some, at = owner[rows], step[rows]
        perturbed = (ranking.position[some] < thresholds[some, at].view(-1, 1, 1)).unsqueeze(1)
        return torch.where(perturbed, replacement[some], kept[some])

    prob[owner, step] = probability(build, owner)
    # Where steps outnumber pixels the first and last states occur more than once.
    prob = torch.where(thresholds == 0, first.view(-1, 1), prob)
    return Curve(fraction, torch.where(thresholds == ranking.count.view(-1, 1), last.view(-1, 1), prob))


def _thresholds(ranking: Rankings, trajectory: Trajectory) -> Tensor:
    """Positions below these are perturbed at each step: ``[B, T + 1]`` float64, NaN past an image's last."""
    count = ranking.count.view(-1, 1)
    if trajectory.unit == "pixels":
        steps = removed_pixels(int(ranking.count[0]), trajectory.steps)
        return steps.to(count.device, torch.float64).expand(len(count), -1)
    parts = torch.arange(int(count.max()) + 1, device=count.device, dtype=torch.float64).expand(len(count), -1)
    return torch.where(parts <= count, parts, torch.nan)
