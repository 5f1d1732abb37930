"""Attribution of concept coefficients: what each concept of a layer does for scores behind it.

For every method that is a gradient in some sense the attribution of a coefficient is u_pq times the derivative by
it, and ``sum_p u_pq dS/du_pq = <sum_p u_pq v_q, dS/dX_p>``: one backward pass a target serves all concepts and all
positions of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.concepts.graph.questions import Question
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.precision import full_precision
from xai_core.registry import Entry, NoOptions, Registry

# Scores of rows with a graph, from the question, the vectors as leaves and the images that they belong to.
Pass = Callable[[Question, Tensor, Tensor], Tensor]

coefficient_attributions: Registry[Entry] = Registry("attribution of coefficients", Entry)


@dataclass(frozen=True)
class PathOptions:
    """``steps``: points of the midpoint rule on the path of the coefficients from zero.

    Not Gauss-Legendre, whose points crowd at the ends: where the path begins at vectors of zeros a layer
    normalisation jumps there, and a point on the flank of the jump upsets the sum (docs/concepts.md).
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"integrated_gradients.steps: expected at least 1, got {self.steps}")


@coefficient_attributions.register(
    "integrated_gradients",
    options=PathOptions,
    paper="iERF, equations 15 and 16; Sundararajan et al. 2017",
)
def integrated_gradients(
    question: Question, queries: Tensor | None, options: PathOptions, batch_size: int
) -> Tensor:
    """ICAT by integrated gradients: coefficients scaled from 0 to 1, an autoencoder's offset left alone."""
    steps = torch.arange(options.steps, dtype=torch.float64)
    places, weights = (steps + 0.5) / options.steps, torch.full_like(steps, 1 / options.steps)
    return along_path(question, queries, places, weights, batch_size)


@coefficient_attributions.register("gradient_x_input", paper="iERF, equation 14; Shrikumar et al. 2016")
def gradient_x_input(question: Question, queries: Tensor | None, options: NoOptions, batch_size: int) -> Tensor:
    """ICAT by the gradient at the coefficients themselves, times the coefficients."""
    return at_the_codes(question, queries, batch_size, plain_scores)


def plain_scores(question: Question, vectors: Tensor, owners: Tensor) -> Tensor:
    """The scores, with the graph of the network as it is."""
    return question.scores(vectors, owners)


def at_the_codes(question: Question, queries: Tensor | None, batch_size: int, scores: Pass) -> Tensor:
    """Coefficients times derivatives, under a pass of one's own, where the coefficients are as they are."""
    one = torch.ones(1, dtype=torch.float64)
    return along_path(question, queries, one, one, batch_size, scores)


def along_path(
    question: Question,
    queries: Tensor | None,
    places: Tensor,
    weights: Tensor,
    batch_size: int,
    scores: Pass = plain_scores,
) -> Tensor:
    """``sum_p u_pq sum_s w_s dS/du_pq``, the derivatives taken where the coefficients are scaled by ``places``.

    All targets share a row's forward pass; their backward passes run one after the other, over the whole batch of
    rows: vectorised ones measured up to 1.6 times slower and hold T times the memory (docs/benchmarks.md).

    Args:
        queries: concepts ``[B, Q]``; None for all of the dictionary's. places, weights: ``[S]``.

    Returns:
        ``[B, Q, T]``, or ``[B, K, T]``; 0 for what is no concept.
    """
    source, steps = question.source, len(places)
    spread = source.spread
    places, weights = (values.to(spread) for values in (places, weights))
    gather = _Gather.of(question, queries)
    total = spread.new_zeros(len(spread), gather.count, question.count)

    def add_rows(rows: slice) -> None:
        flat = torch.arange(rows.start, rows.stop, device=spread.device)
        owners, step = flat // steps, flat % steps
        first, last = rows.start // steps, (rows.stop - 1) // steps + 1
        leaves = torch.addcmul(source.offset, places[step].view(-1, 1, 1), spread[owners]).requires_grad_(True)
        with torch.enable_grad():
            found = scores(question, leaves, owners)

        def of_concepts(gradients: Sequence[Tensor]) -> Tensor:
            weighted = gradients[0] * weights[step].view(-1, 1, 1)
            summed = weighted.new_zeros(last - first, *weighted.shape[1:]).index_add_(0, owners - first, weighted)
            return gather(summed, slice(first, last))

        targets = torch.arange(question.count, device=spread.device).expand(len(flat), -1)
        parts = per_class(found, targets, [leaves], of_concepts)
        # The sum is the last thing a pass does, so that one that is halved for want of memory has added nothing.
        total[first:last] += parts.transpose(1, 2)

    with torch.no_grad():
        run_batches(add_rows, len(spread) * steps, batch_size)
    return total


@dataclass(frozen=True)
class _Gather:
    """From derivatives by the vectors to those by the coefficients, times these, summed over positions."""

    codes: Tensor
    atoms: Tensor

    @classmethod
    def of(cls, question: Question, queries: Tensor | None) -> _Gather:
        source = question.source
        return cls(source.codes, source.atoms) if queries is None else cls(*source.chosen(queries))

    @property
    def count(self) -> int:
        return self.codes.shape[2]

    def __call__(self, gradient: Tensor, images: slice) -> Tensor:
        """``[b, Q]`` from ``[b, P, C]``."""
        atoms = self.atoms if self.atoms.ndim == 2 else self.atoms[images]
        with full_precision(gradient.device):
            return ((gradient @ atoms.transpose(-1, -2)) * self.codes[images]).sum(dim=1)
