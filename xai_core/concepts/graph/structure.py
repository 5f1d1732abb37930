"""What a concept graph is made of: nodes by layer, and edges by pair of neighbouring layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from xai_core.concepts.graph.nodes import Nodes
from xai_core.errors import UsageError

#: What stands for the logits as the last layer of a graph.
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class ConceptGraph:
    """Concept graphs of a batch of images, one an image.

    ``classes`` ``[B, M]``; ``layers`` from the input to the output; ``nodes`` of each layer. ``edges`` of each
    pair of neighbours: ICAT ``[B, N, N']`` from the concepts of the one to those of the next (iERF, equation 14),
    NaN where either is missing; to :data:`CLASSIFIER`, ``[B, N, M]``, what the last layer's concepts do for the
    logits.
    """

    classes: Tensor
    layers: tuple[str, ...]
    nodes: Mapping[str, Nodes]
    edges: Mapping[tuple[str, str], Tensor]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Neighbouring layers, from the input on; the last pair ends at the classifier."""
        return tuple(pairwise((*self.layers, CLASSIFIER)))

    @property
    def finite(self) -> Tensor:
        """Which images have a number at every node and edge that exists, bool ``[B]``."""
        found = torch.ones(len(self.classes), dtype=torch.bool, device=self.classes.device)
        for (source, target), weights in self.edges.items():
            nodes = self.nodes[source]
            found &= (nodes.importance.isfinite().all(dim=2) | ~nodes.there).all(dim=1)
            missing = ~nodes.there.unsqueeze(2)
            if target != CLASSIFIER:
                missing = missing | ~self.nodes[target].there.unsqueeze(1)
            found &= (weights.isfinite() | missing).flatten(1).all(dim=1)
        return found

    def map(self, function: Callable[[Tensor], Tensor]) -> ConceptGraph:
        """The graph with each tensor changed, as by ``lambda tensor: tensor[:1]``."""
        return replace(
            self,
            classes=function(self.classes),
            nodes={layer: nodes.map(function) for layer, nodes in self.nodes.items()},
            edges={pair: function(weights) for pair, weights in self.edges.items()},
        )


def joined(graphs: Sequence[ConceptGraph]) -> ConceptGraph:
    """The graphs of several batches as one."""
    first = graphs[0]
    return replace(
        first,
        classes=torch.cat([graph.classes for graph in graphs]),
        nodes={layer: Nodes.joined(graph.nodes[layer] for graph in graphs) for layer in first.layers},
        edges={pair: torch.cat([graph.edges[pair] for graph in graphs]) for pair in first.edges},
    )


def averaged(graph: ConceptGraph) -> ConceptGraph:
    """The mean graph of images that share their nodes, as one image: the graph of a class (iERF, section VI-D).

    Raises:
        UsageError: the images differ in their nodes or classes.
    """
    shared = [graph.classes, *(graph.nodes[layer].concepts for layer in graph.layers)]
    if any(bool((one != one[:1]).any()) for one in shared):
        raise UsageError(
            "averaged: expected images with the same nodes and classes, got different ones; make the graph with "
            "'nodes' of their mean importance"
        )
    return graph.map(lambda tensor: tensor.mean(dim=0, keepdim=True) if tensor.is_floating_point() else tensor[:1])


def edge_shares(weights: Tensor) -> Tensor:
    """Edges of one pair of layers in [0, 1] for pictures (iERF, section VII-H): over each image's largest one.

    An edge that is not positive has 0: a parent that works against its child does not feed it. Missing ones too.
    """
    positive = weights.nan_to_num(0.0).clamp(min=0)
    largest = positive.amax(dim=(1, 2), keepdim=True)
    return positive / torch.where(largest > 0, largest, 1.0)
