"""The route of concepts through which a class gets most: the strongest path of a concept graph (iERF, VI-E1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.concepts.graph.structure import ConceptGraph, edge_shares
from xai_core.errors import UsageError

Strength = Literal["product", "bottleneck"]

_STRENGTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"product": torch.mul, "bottleneck": torch.minimum}


@dataclass(frozen=True)
class Routes:
    """One route for each class of each image.

    ``places`` ``[B, M, L]``: where the route's concept stands among the nodes of each layer; ``concepts``
    ``[B, M, L]``: the concept itself; both -1 where no route of positive edges leads to the class. ``strength``
    ``[B, M]`` in [0, 1], 0 there.
    """

    places: Tensor
    concepts: Tensor
    strength: Tensor


def strongest_routes(graph: ConceptGraph, strength: Strength = "product") -> Routes:
    """The strongest path from the first layer to each class, by dynamic programming.

    The strength of a path is the ``product`` of its edges, or its weakest edge (``bottleneck``), each edge being
    a share of the largest one of its pair of layers in the image
    (:func:`~xai_core.concepts.graph.structure.edge_shares`): edges of different pairs are in different units.
    Edges to the classifier are shares of the largest one to any of the image's classes, so that classes compare.

    Raises:
        UsageError: an unknown strength.
    """
    if strength not in _STRENGTHS:
        raise UsageError(f"strength: expected one of {', '.join(_STRENGTHS)}, got {strength!r}")
    join = _STRENGTHS[strength]
    weights = [edge_shares(graph.edges[pair]) for pair in graph.pairs]
    reached = graph.nodes[graph.layers[0]].there.to(weights[0])
    parents = []
    for weight in weights:
        reached, parent = join(reached.unsqueeze(2), weight).max(dim=1)
        parents.append(parent)
    return _traced(graph, parents, reached)


def _traced(graph: ConceptGraph, parents: list[Tensor], reached: Tensor) -> Routes:
    place = torch.arange(reached.shape[1], device=reached.device).expand_as(reached)
    places = []
    for parent in reversed(parents):
        place = parent.gather(1, place)
        places.append(place)
    places.reverse()
    of_layers = zip(graph.layers, places, strict=True)
    concepts = [graph.nodes[layer].concepts.gather(1, place) for layer, place in of_layers]
    none = (reached <= 0).unsqueeze(2)
    return Routes(
        places=torch.stack(places, dim=2).masked_fill(none, -1),
        concepts=torch.stack(concepts, dim=2).masked_fill(none, -1),
        strength=reached,
    )
