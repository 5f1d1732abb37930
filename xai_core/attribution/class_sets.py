"""Which classes an explanation is set against (VAR, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ClassSet = Literal["given", "top_k+lowest", "best_worst"]


@dataclass(frozen=True)
class Contest:
    """The classes of each image, and which of them each of its T targets stands against.

    ``classes`` ``[B, U]``: the set, then one slot for each target outside it. ``own`` ``[B, T]``: the slots of
    the targets. ``members`` ``[B, T, U]``: the set and the target itself; other targets' slots are no rivals.
    """

    classes: Tensor
    own: Tensor
    members: Tensor


def most_classes(rule: ClassSet, k: int, given: tuple[int, ...], num_classes: int) -> int:
    """The size of the largest set, the target included where it has to be added."""
    size = {"given": len(given), "top_k+lowest": k + 1, "best_worst": 2}[rule]
    return min(size + 1, num_classes)


def by_probability(logits: Tensor, k: int) -> Tensor:
    """The ``k`` most probable classes and the least probable one, ``[B, k + 1]``.

    All classes of a model that has no more. Of equal logits the lower index counts as the more probable, so that
    no class comes twice.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    return torch.cat([order[:, : min(k, order.shape[1] - 1)], order[:, -1:]], dim=1)


def with_targets(chosen: Tensor, targets: Tensor) -> Contest:
    """A set of classes ``[B, S]`` with each of the targets ``[B, T]`` added where it is absent."""
    size = chosen.shape[1]
    same = targets.unsqueeze(2) == chosen.unsqueeze(1)
    absent = ~same.any(dim=2)
    own = torch.where(absent, size - 1 + absent.cumsum(dim=1), same.long().argmax(dim=2))
    added = int(absent.sum(dim=1).max()) if len(absent) else 0
    # An image with fewer absent targets than its neighbours has slots that are nobody's.
    classes = torch.cat([chosen, chosen[:, :1].expand(-1, added)], dim=1).scatter(1, own, targets)
    slots = torch.arange(classes.shape[1], device=classes.device)
    return Contest(classes, own, (slots < size) | (slots == own.unsqueeze(2)))
