"""Concept graphs as cards of the report: the picture, what it rests on, and its strongest edges in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from markupsafe import Markup

from tasks.report.concept_graph import Graph, GraphRequest
from tasks.report.concept_rows import ConceptKey
from xai_core.render.graph_picture import graph_picture

# Rows of the table that tells a graph's edges in numbers.
MOST_EDGES = 60


@dataclass(frozen=True)
class EdgeRow:
    """An edge in numbers, its ends in words."""

    source_layer: str
    source: str
    target_layer: str
    target: str
    weight: float


@dataclass(frozen=True)
class GraphCard:
    """A graph with its heading, and its strongest edges as a table."""

    title: str
    hint: str
    svg: Markup
    edges: tuple[EdgeRow, ...]


def graph_card(
    number: int,
    request: GraphRequest,
    graph: Graph,
    class_names: Mapping[int, str],
    anchors: Mapping[ConceptKey, str],
    small: Mapping[ConceptKey, str],
) -> GraphCard:
    """A graph as a card: nodes with a sheet get its thumbnail and lead to it; ``number`` tells graphs apart."""
    nodes = [
        replace(node, anchor=anchors.get(key, ""), thumbnail=small.get(key, ""))
        if (key := graph.keys.get(node.id)) is not None
        else node
        for node in graph.nodes
    ]
    names = " and ".join(class_names.get(one, f"class {one}") for one in request.classes)
    subject = request.title or (names if request.image_id is None else f"image {request.image_id}: {names}")
    picture = graph_picture(
        nodes, graph.edges, graph.layers, title=f"Concepts behind {subject}", name=f"graph-{number}"
    )
    images = f"{graph.images} {'image' if graph.images == 1 else 'images'}"
    hint = f"{request.extractor}, edges by {request.attribution_method}, mean over {images}."
    if graph.earlier:
        hint += f" The last {len(graph.layers)} of {len(graph.layers) + graph.earlier} layers."
    return GraphCard(subject, hint, Markup(picture.svg), _edge_rows(graph))


def _edge_rows(graph: Graph) -> tuple[EdgeRow, ...]:
    node = {one.id: one for one in graph.nodes}
    order = sorted(graph.edges, key=lambda edge: (graph.layers.index(node[edge.source].layer), -abs(edge.weight)))
    most = -(-MOST_EDGES // max(1, len(graph.layers) - 1))
    counts: dict[str, int] = {}
    found = []
    for edge in order:
        source, target = node[edge.source], node[edge.target]
        counts[source.layer] = counts.get(source.layer, 0) + 1
        if counts[source.layer] <= most:
            found.append(EdgeRow(source.layer, source.label, target.layer, target.label, edge.weight))
    return tuple(found)
