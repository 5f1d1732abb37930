"""What a layered graph picture is made of, and the refusal of what cannot be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from xai_core.errors import UsageError

LAYERS = range(2, 9)
MOST_NODES = 12


@dataclass(frozen=True)
class Node:
    """A concept, or a class in the last layer.

    Attributes:
        id: unique in its graph; layer: its column; label: of any length, cut where it does not fit.
        weight: its attribution, shown as a bar relative to the strongest of its layer; None: no bar.
        group: what colours it, say the class that it belongs to; empty: no colour of its own.
        thumbnail: a ``data:image/...`` URI, or nothing; anchor: the id of the element that it leads to.
    """

    id: str
    layer: str
    label: str
    weight: float | None = None
    group: str = ""
    thumbnail: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Edge:
    """What a node contributes to one of a later layer, of either sign."""

    source: str
    target: str
    weight: float


def refuse(nodes: Sequence[Node], edges: Sequence[Edge], layers: Sequence[str], most_groups: int) -> None:
    """Refuses a graph that cannot be drawn as columns of layers.

    Raises:
        UsageError: naming what is wrong.
    """
    _refuse_layers(nodes, layers)
    _refuse_nodes(nodes, most_groups)
    _refuse_edges({node.id: layers.index(node.layer) for node in nodes}, edges)


def _refuse_layers(nodes: Sequence[Node], layers: Sequence[str]) -> None:
    if len(layers) not in LAYERS or len(set(layers)) < len(layers):
        raise UsageError(
            f"layers: expected {LAYERS[0]} to {LAYERS[-1]} different layers, got {len(layers)}: "
            f"{', '.join(layers) or 'none'}; choose some of them"
        )
    counts = Counter(node.layer for node in nodes)
    if set(counts) != set(layers):
        wrong = ", ".join(sorted(set(counts) ^ set(layers)))
        raise UsageError(
            f"layers: expected every layer to have nodes and every node one of the layers, got {wrong}"
        )
    largest = max(layers, key=lambda layer: counts[layer])
    if counts[largest] > MOST_NODES:
        raise UsageError(
            f"nodes: expected at most {MOST_NODES} a layer, got {counts[largest]} in {largest}; keep the strongest"
        )


def _refuse_nodes(nodes: Sequence[Node], most_groups: int) -> None:
    twice = [id for id, count in Counter(node.id for node in nodes).items() if count > 1]
    if twice:
        raise UsageError(f"nodes: expected ids of their own, got {twice[0]!r} more than once")
    groups = {node.group for node in nodes} - {""}
    if len(groups) > most_groups:
        raise UsageError(f"nodes: expected at most {most_groups} groups, got {len(groups)}; leave some empty")
    for node in nodes:
        if node.thumbnail and not node.thumbnail.startswith("data:image/"):
            raise UsageError(
                f"thumbnail of {node.id!r}: expected a data:image/... URI, got {node.thumbnail[:40]!r}; a picture "
                "holds all it shows"
            )
        if node.weight is not None and not isfinite(node.weight):
            raise UsageError(f"weight of {node.id!r}: expected a finite number or None, got {node.weight}")


def _refuse_edges(place: dict[str, int], edges: Sequence[Edge]) -> None:
    seen: set[tuple[str, str]] = set()
    for edge in edges:
        named = f"edge {edge.source!r} -> {edge.target!r}"
        if edge.source not in place or edge.target not in place:
            raise UsageError(f"{named}: expected the ids of two nodes, got one that there is not")
        if place[edge.source] >= place[edge.target]:
            raise UsageError(f"{named}: expected an edge from an earlier to a later layer, got one that is not")
        if not isfinite(edge.weight):
            raise UsageError(f"{named}: expected a finite weight, got {edge.weight}")
        if (edge.source, edge.target) in seen:
            raise UsageError(f"{named}: expected once, got twice; add up their weights")
        seen.add((edge.source, edge.target))
