"""concept_graph: each image's most important concepts in every layer, and what those of one do for the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from storage.schema import rows_to_table
from tasks.dictionary_file import SEPARATOR, committed_dictionary
from tasks.stage import Context, Outcome, Stage
from tasks.targets import predicted_pictures, read_targets
from tasks.worker import study_classifier
from xai_core.batching import try_batches
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph import (
    CLASSIFIER,
    ConceptGraph,
    InterlayerCurves,
    concept_graph,
    interlayer_curves,
)
from xai_core.concepts.graph.curves import UNDEFINED
from xai_core.errors import NotFinite
from xai_core.precision import precision_context

Rows = dict[str, list[Any]]


#: The test of edges between two layers, by attribution.
Curves = Mapping[str, InterlayerCurves]


@dataclass(frozen=True)
class _Found:
    """The graphs of some images, and by pair of layers the test of their edges."""

    graph: ConceptGraph
    curves: Mapping[tuple[str, str], Curves]


def run(context: Context) -> Outcome:
    """Rows of ``concept_scores``, ``concept_edges`` and, where attributions are compared, of ``concept_insertion``
    and ``concept_curves``, for the first images of a study and one extractor.
    """
    config = context.config.concepts.graph_or_default
    extractor = context.work.unit.variant
    pictures = predicted_pictures(context).of_images(range(config.images))
    dictionaries = read_dictionaries(context, extractor)
    if dictionaries is None or not len(pictures):
        return Outcome(pictures.given, len(pictures), pictures.bad)
    targets = read_targets(context, pictures)
    measure = _Measure(context, dictionaries)

    def measured(rows: slice) -> _Found:
        return measure(pictures.inputs[rows], targets[rows].view(-1, 1))

    with precision_context("fp32", context.device):
        batches = try_batches(measured, len(pictures), context.config.run.batch_size)
    kept = pictures.take(batches.rows)
    _write(context, batches.results, kept.image_ids)
    return Outcome(pictures.given, len(kept), (*pictures.bad, *pictures.as_bad(batches.failed)))


class _Measure:
    """Makes the graphs of pictures, and tests their edges under each attribution that is compared."""

    def __init__(self, context: Context, dictionaries: Mapping[str, Dictionary]) -> None:
        self._model = study_classifier(context)
        self._layers = context.config.concepts.layers
        self._dictionaries = dictionaries
        self._config = context.config.concepts.graph_or_default
        self._batch_size = context.config.run.batch_size

    def __call__(self, images: Tensor, classes: Tensor) -> _Found:
        graph = concept_graph(
            self._model,
            images,
            classes,
            self._layers,
            self._dictionaries,
            options=self._config.options(),
            batch_size=self._batch_size,
        )
        if not bool(graph.finite.all()):
            raise NotFinite("the importance of a concept, or an edge, is NaN or infinite")
        return _Found(graph, {pair: self._curves(graph, images, *pair) for pair in self._tested})

    @property
    def _tested(self) -> Iterator[tuple[str, str]]:
        return pairwise(self._layers if self._config.compare else ())

    def _curves(self, graph: ConceptGraph, images: Tensor, source: str, target: str) -> Curves:
        """The test of every attribution, on the most important children of each image."""
        return interlayer_curves(
            self._model,
            images,
            source,
            target,
            self._dictionaries,
            {choice.name: choice.options for choice in self._config.compare},
            targets=graph.nodes[target].concepts[:, : self._config.compared_children],
            steps=self._config.insertion_steps,
            penalty=self._config.penalty,
            batch_size=self._batch_size,
        )


def read_dictionaries(context: Context, extractor: str) -> dict[str, Dictionary] | None:
    """The dictionaries of all layers by one extractor; None where one could not be fitted for want of vectors.

    Raises:
        UsageError: one is of another layer or of another model.
    """
    found = {}
    for layer in context.config.concepts.layers:
        dictionary = committed_dictionary(context, layer, extractor)
        if dictionary is None:
            return None
        found[layer] = dictionary
    return found


def _write(context: Context, batches: list[_Found], image_ids: np.ndarray) -> None:
    """The rows of all batches, which are of these images in their order."""
    extractor, config = context.work.unit.variant, context.config.concepts.graph_or_default
    parts: dict[str, list[Rows]] = {"concept_scores": [], "concept_edges": []}
    if config.compare:
        parts |= {"concept_insertion": [], "concept_curves": []}
    for found in batches:
        ids, image_ids = np.split(image_ids, [len(found.graph.classes)])
        parts["concept_scores"] += score_rows(found.graph, ids, extractor)
        parts["concept_edges"] += edge_rows(found.graph, ids, extractor, config.edges.id)
        for pair, curves in found.curves.items():
            for choice in config.compare:
                about = {"extractor": extractor, "attribution_method": choice.id}
                about |= dict(zip(("source_layer", "target_layer"), pair, strict=True))
                parts["concept_insertion"].append(_areas(curves[choice.name], ids, about))
                parts["concept_curves"] += _curves(curves[choice.name], ids, about)
    for name, rows in parts.items():
        context.commit.table(name, rows_to_table(name, joined(rows)))


def score_rows(graph: ConceptGraph, image_ids: np.ndarray, extractor: str) -> Iterator[Rows]:
    """Rows of one layer after the other: each image's concepts, the most important first."""
    for layer, nodes in graph.nodes.items():
        image, rank = (one.cpu() for one in nodes.there.nonzero(as_tuple=True))
        for position in range(graph.classes.shape[1]):
            yield {
                "image_id": image_ids[image].tolist(),
                "layer": [layer] * len(image),
                "extractor": [extractor] * len(image),
                "class_id": graph.classes[:, position].cpu()[image].tolist(),
                "concept_id": nodes.concepts.cpu()[image, rank].tolist(),
                "rank": rank.tolist(),
                "attribution": nodes.importance[:, :, position].cpu()[image, rank].tolist(),
                "coefficient": nodes.coefficients.cpu()[image, rank].tolist(),
            }


def edge_rows(graph: ConceptGraph, image_ids: np.ndarray, extractor: str, attribution: str) -> Iterator[Rows]:
    """Rows of one pair of layers after the other; to the classifier a target is a class."""
    for (source_layer, target_layer), weights in graph.edges.items():
        image, source, target = (one.cpu() for one in (~weights.isnan()).nonzero(as_tuple=True))
        heads = graph.classes if target_layer == CLASSIFIER else graph.nodes[target_layer].concepts
        yield {
            "image_id": image_ids[image].tolist(),
            "extractor": [extractor] * len(image),
            "attribution_method": [attribution] * len(image),
            "class_id": graph.classes[:, 0].cpu()[image].tolist(),
            "source_layer": [source_layer] * len(image),
            "target_layer": [target_layer] * len(image),
            "source": graph.nodes[source_layer].concepts.cpu()[image, source].tolist(),
            "target": heads.cpu()[image, target].tolist(),
            "weight": weights.cpu()[image, source, target].tolist(),
        }


def _areas(curves: InterlayerCurves, image_ids: np.ndarray, about: Mapping[str, str]) -> Rows:
    """One row for each image and target; where a curve is not defined, why."""
    image, place = (one.cpu() for one in (curves.targets >= 0).nonzero(as_tuple=True))
    defined = ~curves.undefined.cpu()[image, place]
    areas = {
        name: [
            value if known else None
            for value, known in zip(area.cpu()[image, place].tolist(), defined, strict=True)
        ]
        for name, area in (("insertion", curves.insertion_area), ("deletion", curves.deletion_area))
    }
    return {
        "image_id": image_ids[image].tolist(),
        **{name: [value] * len(image) for name, value in about.items()},
        "target": curves.targets.cpu()[image, place].tolist(),
        **areas,
        "reason": [None if known else UNDEFINED for known in defined],
    }


def _curves(curves: InterlayerCurves, image_ids: np.ndarray, about: Mapping[str, str]) -> Iterator[Rows]:
    """The steps of all curves that are defined."""
    for name, alignment in (("insertion", curves.insertion), ("deletion", curves.deletion)):
        there = ((curves.targets >= 0) & ~curves.undefined).unsqueeze(2).expand_as(alignment)
        image, place, step = (one.cpu() for one in there.nonzero(as_tuple=True))
        yield {
            "image_id": image_ids[image].tolist(),
            **{key: [value] * len(image) for key, value in about.items()},
            "target": curves.targets.cpu()[image, place].tolist(),
            "curve": [name] * len(image),
            "step": step.tolist(),
            "fraction": (step / (alignment.shape[2] - 1)).tolist(),
            "alignment": alignment.cpu()[image, place, step].tolist(),
        }


def joined(parts: list[Rows]) -> Rows:
    """The rows of several parts as one."""
    return {column: [value for part in parts for value in part[column]] for column in (parts[0] if parts else {})}


STAGE = Stage(
    name="concept_graph",
    version=1,
    run=run,
    reads=lambda study, variant: {
        "graph": study.config.concepts.graph_or_default.model_dump(mode="json"),
        "layers": list(study.config.concepts.layers),
    },
    upstream=lambda study, variant: (
        ("manifest", ""),
        ("predict", ""),
        *(("dictionary", f"{layer}{SEPARATOR}{variant}") for layer in study.config.concepts.layers),
    ),
    variants=lambda study: study.config.concepts.graph_extractors,
    summary="attributes concepts to classes and to concepts of the layer before",
)
