"""The concept graph of a class, of several, or of one image, from rows of scores and edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from tasks.report.concept_rows import ConceptKey, RankedConcept, ranked_concepts, strongest
from xai_core.errors import UsageError
from xai_core.render.graph_layout import layer_order
from xai_core.render.graph_parts import LAYERS, MOST_NODES, Edge, Node

# Of each class in every layer, as in iERF, figure 9.
PER_LAYER = 5

SHARED = "shared"

# Each has a colour, and so have shared concepts.
MOST_CLASSES = 5


@dataclass(frozen=True)
class GraphRequest:
    """Which graph to draw: of classes over all their images, or over one image.

    ``layers`` are those to show, from early to late; empty: all that edges tell of. ``title``: by default the
    classes' names.
    """

    extractor: str
    attribution_method: str
    classes: tuple[int, ...]
    image_id: int | None = None
    layers: tuple[str, ...] = ()
    per_layer: int = PER_LAYER
    title: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes and edges to draw, the layers from early to late, and on how many images the weights rest.

    ``earlier`` layers before the first are left out: a picture has room for eight. ``keys`` name the concept
    of every node that is one.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    layers: tuple[str, ...]
    images: int
    earlier: int
    keys: Mapping[str, ConceptKey]


def concept_graph(
    scores: pa.Table, edges: pa.Table, request: GraphRequest, class_names: Mapping[int, str]
) -> Graph | None:
    """The graph of a request, or None where no image has edges for it.

    Nodes are the strongest concepts of each class and layer; those that are among the strongest of several
    classes are shared. Weights are means over the images that were explained for one of the classes, for an
    edge to a class over those explained for that class, 0 where an image has no such edge.

    Raises:
        UsageError: no class, more classes or concepts than fit into one picture, layers that there are not, or
            scores and edges that do not belong together.
    """
    _refuse(request)
    scores, edges = _chosen(scores, edges, request)
    if not edges.num_rows:
        return None
    ranked = [
        one
        for class_id in request.classes
        for one in strongest(ranked_concepts(scores, request.extractor, class_id), request.per_layer)
    ]
    every = _layers(edges, {one.key[0] for one in ranked}, request.layers)
    layers = every[-LAYERS[-1] :]
    nodes = _concept_nodes([one for one in ranked if one.key[0] in layers], class_names)
    drawn = (*(node for node, _ in nodes), *_class_nodes(layers[-1], request.classes, class_names))
    known = {node.id for node in drawn}
    links = tuple(
        Edge(source, target, weight)
        for (source, target), weight in _mean_weights(edges, layers[-1]).items()
        if {source, target} <= known
    )
    images = pc.count_distinct(edges["image_id"]).as_py()
    return Graph(drawn, links, layers, images, len(every) - len(layers), {node.id: key for node, key in nodes})


def _refuse(request: GraphRequest) -> None:
    most = MOST_NODES // max(1, len(request.classes))
    if not 1 <= len(set(request.classes)) == len(request.classes) <= MOST_CLASSES:
        raise UsageError(f"graph: expected 1 to {MOST_CLASSES} different classes, got {request.classes}")
    if not 1 <= request.per_layer <= most:
        raise UsageError(
            f"graph: expected 1 to {most} concepts a layer for each of {len(request.classes)} classes, got "
            f"{request.per_layer}; a layer has room for {MOST_NODES}"
        )


def _chosen(scores: pa.Table, edges: pa.Table, request: GraphRequest) -> tuple[pa.Table, pa.Table]:
    """The rows that a request is about."""
    classes = pa.array(request.classes)
    wanted = {
        "extractor": pa.array([request.extractor]),
        "class_id": classes,
        "image_id": None if request.image_id is None else pa.array([request.image_id]),
    }
    found = []
    for table in (scores, edges):
        for column, values in wanted.items():
            if values is not None and table.num_rows:
                table = table.filter(pc.is_in(table[column], values.cast(table[column].type)))
        found.append(table)
    if found[1].num_rows:
        found[1] = found[1].filter(pc.equal(found[1]["attribution_method"], request.attribution_method))
    return found[0], found[1]


def _layers(edges: pa.Table, of_concepts: set[str], asked: Sequence[str]) -> tuple[str, ...]:
    """The layers to draw, from early to late; the last holds the classes."""
    pairs = edges.group_by(["source_layer", "target_layer"], use_threads=False).aggregate([]).to_pylist()
    order = layer_order([(row["source_layer"], row["target_layer"]) for row in pairs])
    heads = [layer for layer in order if layer not in of_concepts]
    if len(heads) != 1 or heads[0] != order[-1]:
        raise UsageError(
            "graph: expected one layer without concepts, the last one, for the classes, got "
            f"{', '.join(heads) or 'none'} of {', '.join(order)}; give scores and edges of the same run"
        )
    unknown = [layer for layer in asked if layer not in order]
    if unknown:
        raise UsageError(f"graph: expected layers of {', '.join(order)}, got {', '.join(unknown)}")
    return tuple(layer for layer in order if layer in asked or layer in heads) if asked else tuple(order)


def _concept_nodes(
    ranked: Sequence[RankedConcept], class_names: Mapping[int, str]
) -> list[tuple[Node, ConceptKey]]:
    """A node for every concept; the attribution of a shared one is the mean over its classes."""
    of_key: dict[ConceptKey, list[RankedConcept]] = {}
    for one in ranked:
        of_key.setdefault(one.key, []).append(one)
    found = []
    for key, members in of_key.items():
        layer, _, concept = key
        (first, *others) = members
        class_id = first.class_id if first.class_id is not None else -1
        group = SHARED if others else class_names.get(class_id, f"class {class_id}")
        weight = sum(one.attribution for one in members) / len(members)
        found.append((Node(_concept_id(layer, concept), layer, f"concept {concept}", weight, group), key))
    return found


def _class_nodes(layer: str, classes: Sequence[int], class_names: Mapping[int, str]) -> list[Node]:
    names = {one: class_names.get(one, f"class {one}") for one in classes}
    return [Node(_class_id(layer, one), layer, name, group=name) for one, name in names.items()]


def _mean_weights(edges: pa.Table, last: str) -> dict[tuple[str, str], float]:
    """Mean weights by source and target node."""
    pair = ["source_layer", "target_layer", "source", "target"]
    # An edge between two concepts stands in the rows of every class that the image was explained for.
    by_image = edges.group_by(["image_id", *pair], use_threads=False).aggregate([("weight", "mean")])
    summed = by_image.group_by(pair, use_threads=False).aggregate([("weight_mean", "sum")])
    all_images = pc.count_distinct(edges["image_id"]).as_py()
    of_class = {
        row["class_id"]: row["image_id_count_distinct"]
        for row in edges.group_by(["class_id"], use_threads=False)
        .aggregate([("image_id", "count_distinct")])
        .to_pylist()
    }
    found = {}
    for row in summed.to_pylist():
        to_class = row["target_layer"] == last
        target = _class_id(last, row["target"]) if to_class else _concept_id(row["target_layer"], row["target"])
        images = of_class.get(row["target"], all_images) if to_class else all_images
        found[_concept_id(row["source_layer"], row["source"]), target] = row["weight_mean_sum"] / images
    return found


def _concept_id(layer: str, concept: int) -> str:
    return f"{layer}/{concept}"


def _class_id(layer: str, class_id: int) -> str:
    return f"{layer}/class {class_id}"
