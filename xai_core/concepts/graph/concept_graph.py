"""Making concept graphs: nodes by importance for the classes, edges by ICAT, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph.decomposition import Decomposition, decompose
from xai_core.concepts.graph.nodes import Importance, Nodes, blank, coefficients, pick, top_concepts
from xai_core.concepts.graph.options import GraphOptions, check_penalty
from xai_core.concepts.graph.questions import Alignment, Logits
from xai_core.concepts.graph.structure import CLASSIFIER, ConceptGraph, joined
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.replay import Between, networks_between

# Concepts of each image, from the importance of all and the number wanted for a class.
Select = Callable[[Importance, int], Tensor]


def node_importance(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
    *,
    options: GraphOptions | None = None,
    batch_size: int = 32,
) -> dict[str, Importance]:
    """Importance of every concept of the layers for class logits (iERF, section VI-A2).

    The sum over positions of AT(u_iq, logit_c), where the network behind the layer is fed the reconstruction X^.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, M]``.

    Raises:
        UsageError: as for :func:`concept_graph`.
    """
    options = options or GraphOptions()
    check_request(model, images, classes, layers, dictionaries, options)
    attribution = options.node_attribution()

    def some(rows: slice) -> dict[str, Importance]:
        network = _Network(model, images[rows], classes[rows], layers, dictionaries, options.penalty)
        return {
            layer: Importance(
                attribution(network.logits(layer), None, batch_size),
                coefficients(network.coded[layer]),
                network.coded[layer].active,
            )
            for layer in layers
        }

    parts = run_batches(some, len(images), max(1, batch_size // attribution.passes))
    return {layer: _joined_importance([part[layer] for part in parts]) for layer in layers}


def concept_graph(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
    *,
    options: GraphOptions | None = None,
    nodes: Mapping[str, Tensor] | None = None,
    batch_size: int = 32,
) -> ConceptGraph:
    """Interlayer concept graphs of images (iERF, section VI): nodes by importance, edges by ICAT.

    Several classes an image give one graph with the union of their nodes, which is what the diagnosis reads.

    Args:
        images: normalised ``[B, 3, H, W]``; classes: ``[B, M]``, given or predicted.
        layers: names of at least one layer in the order of the pass; dictionaries: one for each.
        nodes: concepts ``[B, N]`` of each layer where they are given, -1 for none, as those of a class
            (:meth:`~xai_core.concepts.graph.nodes.Importance.mean`); by default each image's most important ones.
        batch_size: rows in a pass; the codes of at most so many images are held.

    Raises:
        UsageError: layers out of order, without spatial positions or without a dictionary of their width, classes
            that the model does not have, an attribution that is not defined on the network.
    """
    options = options or GraphOptions()
    check_request(model, images, classes, layers, dictionaries, options)
    _check_nodes(nodes, images, layers, dictionaries)
    return build(model, images, classes, layers, dictionaries, options, batch_size, given=nodes)


def build(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
    options: GraphOptions,
    batch_size: int,
    *,
    given: Mapping[str, Tensor] | None = None,
    select: Select = top_concepts,
    together: int = 1,
) -> ConceptGraph:
    """Graphs of a checked request.

    Args:
        given: nodes; or select: chooses them by the importance of all concepts of neighbouring images, of which
            ``together`` are never parted.
    """
    most = max(options.edge_attribution().passes, options.node_attribution().passes)

    def some(groups: slice) -> ConceptGraph:
        rows = slice(groups.start * together, groups.stop * together)
        network = _Network(model, images[rows], classes[rows], layers, dictionaries, options.penalty)
        if given is None:
            found = {layer: network.nodes(layer, options, select, batch_size) for layer in layers}
        else:
            found = {layer: network.given(layer, options, given[layer][rows], batch_size) for layer in layers}
        edges = {
            (a, b): network.edges(a, b, found[a].concepts, found[b].concepts, options, batch_size)
            for a, b in pairwise(layers)
        }
        edges[layers[-1], CLASSIFIER] = network.to_classifier(layers[-1], found[layers[-1]], options, batch_size)
        return ConceptGraph(classes[rows], tuple(layers), found, edges)

    return joined(run_batches(some, len(images) // together, max(1, batch_size // (most * together))))


class _Network:
    """What the graph of some images is read from: their decompositions, and the networks between the layers."""

    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        classes: Tensor,
        layers: Sequence[str],
        dictionaries: Mapping[str, Dictionary],
        penalty: float,
    ) -> None:
        self._model = model
        self._classes = classes
        pairs = [*pairwise(layers), *((layer, None) for layer in layers)]
        with torch.no_grad():
            parts = networks_between(model, images.detach(), pairs)
        self._between: dict[tuple[str, str | None], Between] = dict(zip(pairs, parts, strict=True))
        self.coded: dict[str, Decomposition] = {
            layer: decompose(
                model, self._between[layer, None].activation, layer, dictionaries[layer], penalty=penalty
            )
            for layer in layers
        }

    def logits(self, layer: str) -> Logits:
        return Logits(self._model, self.coded[layer], self._between[layer, None], self._classes)

    def nodes(self, layer: str, options: GraphOptions, select: Select, batch_size: int) -> Nodes:
        source = self.coded[layer]
        found = options.node_attribution()(self.logits(layer), None, batch_size)
        everything = Importance(found, coefficients(source), source.active)
        concepts = select(everything, options.concepts)
        return Nodes(concepts, pick(found, concepts), pick(everything.coefficients, concepts))

    def given(self, layer: str, options: GraphOptions, concepts: Tensor, batch_size: int) -> Nodes:
        found = options.node_attribution()(self.logits(layer), concepts, batch_size)
        summed = coefficients(self.coded[layer])
        return Nodes(concepts, blank(found, concepts, 1), pick(summed, concepts))

    def edges(
        self, a: str, b: str, queries: Tensor, targets: Tensor, options: GraphOptions, batch_size: int
    ) -> Tensor:
        question = Alignment(self._model, self.coded[a], self._between[a, b], self.coded[b], targets)
        weights = options.edge_attribution()(question, queries, batch_size)
        return blank(blank(weights, queries, 1), targets, 2)

    def to_classifier(self, layer: str, nodes: Nodes, options: GraphOptions, batch_size: int) -> Tensor:
        attribution = options.edge_attribution()
        if attribution == options.node_attribution():
            return nodes.importance
        return blank(attribution(self.logits(layer), nodes.concepts, batch_size), nodes.concepts, 1)


def _joined_importance(parts: Sequence[Importance]) -> Importance:
    tensors = [(part.importance, part.coefficients, part.active) for part in parts]
    return Importance(*(torch.cat(one) for one in zip(*tensors, strict=True)))


def check_request(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
    options: GraphOptions,
) -> None:
    """Refuses what no graph can be made of.

    Raises:
        UsageError: see :func:`concept_graph`.
    """
    if isinstance(layers, str) or not layers or len(set(layers)) < len(layers):
        raise UsageError(f"layers: expected a list of different module names, got {layers!r}")
    if images.ndim != 4 or not len(images) or classes.ndim != 2 or len(classes) != len(images):
        raise UsageError(
            "expected images [B, 3, H, W] and classes [B, M], at least one of each, got "
            f"{tuple(images.shape)} and {tuple(classes.shape)}"
        )
    if not classes.numel() or not bool(((classes >= 0) & (classes < model.num_classes)).all()):
        raise UsageError(
            f"classes: expected indices from 0 to {model.num_classes - 1}, at least one an image, got "
            f"{classes.unique().tolist()[:10]}"
        )
    missing = [layer for layer in layers if layer not in dictionaries]
    if missing:
        raise UsageError(
            f"dictionaries: expected one for each layer, got none for {', '.join(missing)}; fit them first"
        )
    check_penalty(options.penalty, {layer: dictionaries[layer] for layer in layers})


def _check_nodes(
    nodes: Mapping[str, Tensor] | None,
    images: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
) -> None:
    for layer in layers if nodes is not None else ():
        given = nodes.get(layer) if nodes is not None else None
        size = len(dictionaries[layer].atoms)
        if given is None or given.ndim != 2 or len(given) != len(images) or not bool((given < size).all()):
            raise UsageError(
                f"nodes: expected concepts [{len(images)}, N] below {size} for layer {layer!r}, got "
                f"{None if given is None else tuple(given.shape)}"
            )
