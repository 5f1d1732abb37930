"""Nodes of the concept graph: what each concept of a layer does for class logits, and which matter most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.concepts.graph.decomposition import NO_CONCEPT, Decomposition


@dataclass(frozen=True)
class Importance:
    """What all concepts of one layer do for the logits of an image's classes.

    ``importance`` ``[B, K, M]``, in logits; ``coefficients`` ``[B, K]``, summed over positions; ``active``
    ``[B, K]`` bool, whether a concept is there at all.
    """

    importance: Tensor
    coefficients: Tensor
    active: Tensor

    def mean(self) -> Importance:
        """The mean over the images, as one image (B = 1): the view of a class, where all are of one class.

        A concept that an image does not have counts as 0 there; it is active where any image has it.
        """
        return Importance(
            self.importance.mean(dim=0, keepdim=True),
            self.coefficients.mean(dim=0, keepdim=True),
            self.active.any(dim=0, keepdim=True),
        )


@dataclass(frozen=True)
class Nodes:
    """Concepts chosen of one layer, the most important first.

    ``concepts`` ``[B, N]`` int64, :data:`NO_CONCEPT` (-1) where an image has fewer; ``importance`` ``[B, N, M]``
    and ``coefficients`` ``[B, N]`` (summed over positions) are NaN there.
    """

    concepts: Tensor
    importance: Tensor
    coefficients: Tensor

    @property
    def there(self) -> Tensor:
        """Which of the places hold a concept, bool ``[B, N]``."""
        return self.concepts != NO_CONCEPT

    def map(self, function: Callable[[Tensor], Tensor]) -> Nodes:
        """The nodes with each tensor changed."""
        return Nodes(function(self.concepts), function(self.importance), function(self.coefficients))

    @classmethod
    def joined(cls, parts: Iterable[Nodes]) -> Nodes:
        """The nodes of several batches as one."""
        tensors = [(part.concepts, part.importance, part.coefficients) for part in parts]
        return cls(*(torch.cat(one) for one in zip(*tensors, strict=True)))


def top_concepts(found: Importance, count: int) -> Tensor:
    """The ``count`` most important concepts for each class, united over the classes (iERF, section VI-A2).

    Only concepts that the image has, and that do something for the logit, can be chosen. The union is ordered by
    the largest importance for any class.

    Returns:
        ``[B, min(count * M, K)]`` int64, :data:`NO_CONCEPT` behind the union's end.
    """
    member = among_the_best(found.importance, found.active, count)
    width = min(count * found.importance.shape[2], member.shape[1])
    largest = found.importance.amax(dim=2).masked_fill(~member, -torch.inf)
    strength, concepts = largest.topk(width, dim=1)
    return torch.where(strength > -torch.inf, concepts, NO_CONCEPT)


def among_the_best(importance: Tensor, there: Tensor, count: int) -> Tensor:
    """Which are among the ``count`` most important for any class, of those that are there; bool ``[B, N]``.

    An importance of exactly 0, as of patch tokens behind the last attention, makes no concept important.

    Args:
        importance: ``[B, N, M]``; there: bool ``[B, N]``.
    """
    usable = there.unsqueeze(2) & (importance != 0)
    strength, best = importance.masked_fill(~usable, -torch.inf).topk(min(count, there.shape[1]), dim=1)
    chosen = (strength > -torch.inf).flatten(1).int()
    return torch.zeros_like(there, dtype=torch.int32).scatter_add_(1, best.flatten(1), chosen) > 0


def pick(values: Tensor, concepts: Tensor) -> Tensor:
    """Values of chosen concepts ``[B, N, ...]`` from those of all ``[B, K, ...]``; NaN where there is none."""
    index = concepts.clamp(min=0).view(*concepts.shape, *[1] * (values.ndim - 2))
    picked = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
    return blank(picked, concepts, 1)


def blank(values: Tensor, concepts: Tensor, dimension: int) -> Tensor:
    """Values with NaN where there is no concept ``[B, N]``, the concepts numbering ``dimension``."""
    shape = [len(concepts), *[1] * (values.ndim - 1)]
    shape[dimension] = concepts.shape[1]
    return values.masked_fill((concepts == NO_CONCEPT).view(shape), torch.nan)


def coefficients(source: Decomposition) -> Tensor:
    """The coefficients of all concepts, summed over positions, ``[B, K]``."""
    return source.codes.sum(dim=1)
