"""The report's section about concepts, from what a run committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import SourceError
from storage.results import Results
from tasks.config import DatasetConfig
from tasks.predict import class_names
from tasks.report.concept_charts import curves_of
from tasks.report.concept_graph import GraphRequest
from tasks.report.concept_rows import ConceptKey
from tasks.report.concept_sheets import exemplars_of
from tasks.report.concepts import ConceptSection, ConceptTables, concept_section, shown_concepts
from tasks.report.tiles import Rows
from tasks.sources import open_source, read_listed
from tasks.stage import Context
from tasks.worker import study_classifier
from xai_core.models import Classifier
from xai_core.render.concept_sheet import Exemplars

# A graph shows the classes of most images side by side, as iERF's figure 9 does.
CLASSES_TOGETHER = 2

# Why there are no dictionaries: whether layers were asked for.
NOTHING = {
    False: "No layer was asked for: name some under concepts.layers.",
    True: "Fewer than two vectors were sampled: there is nothing to fit.",
}

NAMES = ("concepts", "concept_scores", "concept_edges", "sae_training", "concept_insertion", "cafe")


def concepts_of_run(context: Context, results: Results) -> ConceptSection:
    """The section of a run: its dictionaries, the graph of its most frequent classes, and all that was tested."""
    tables = ConceptTables(**{name: results.table(name).drop_columns("run_id") for name in NAMES})
    names = dict(enumerate(class_names(context, study_classifier(context))))
    graphs = _graphs(context, tables.table("concept_edges"))
    extractors = context.config.concepts.graph_extractors
    curves = curves_of(results.table("concept_curves"), extractors[0]) if extractors else {}
    keys = shown_concepts(tables, graphs, names)
    found = concept_section(
        tables,
        class_names=names,
        exemplars=read_exemplars(study_classifier(context), context.config.dataset, results, keys),
        graphs=graphs,
        curves=curves,
    )
    return replace(found, nothing=NOTHING[bool(context.config.concepts.layers)])


def read_exemplars(
    model: Classifier, dataset: DatasetConfig, results: Results, keys: list[ConceptKey]
) -> dict[ConceptKey, Exemplars]:
    """Pictures and receptive fields of the exemplars of some concepts."""
    if not keys:
        return {}
    rows = Rows(results)
    targets = results.table("targets").select(["image_id", "target_name"]).to_pylist()
    layers = {layer for layer, _, _ in keys}
    return exemplars_of(
        _of_concepts(results.table("concept_exemplars"), keys),
        keys,
        _Pictures(model, dataset, results),
        lambda row: _field(rows, row),
        {layer: size for layer in layers if (size := _map_size(results, layer)) is not None},
        {row["image_id"]: row["target_name"] for row in targets},
    )


def _of_concepts(table: pa.Table, keys: list[ConceptKey]) -> pa.Table:
    return table.filter(pc.is_in(table["concept_id"], pa.array(sorted({key[2] for key in keys}), pa.int32())))


class _Pictures:
    """Pictures by image id as the model saw them, ``[3, H, W]`` in [0, 1], each read once."""

    def __init__(self, model: Classifier, dataset: DatasetConfig, results: Results) -> None:
        self._model = model
        self._source = open_source(dataset)
        columns = results.table("manifest").select(["image_id", "path", "sha256"]).to_pylist()
        self._listed = {row["image_id"]: row for row in columns}
        self._read: dict[int, np.ndarray | None] = {}

    def __call__(self, image_id: int) -> np.ndarray | None:
        """None where the picture is gone or has changed."""
        if image_id not in self._read:
            self._read[image_id] = self._open(self._listed[image_id])
        return self._read[image_id]

    def _open(self, row: Mapping[str, Any]) -> np.ndarray | None:
        try:
            inputs = self._model.preprocess(read_listed(self._source, row["path"], row["sha256"]))
        except (OSError, SourceError):
            return None
        return self._model.denormalise(inputs.unsqueeze(0))[0].numpy()


def _field(rows: Rows, exemplar: Mapping[str, Any]) -> np.ndarray | None:
    """The receptive field of an exemplar: that of the image's vector at its position."""
    layer, image_id = exemplar["layer"], exemplar["image_id"]
    positions = rows.row(f"pfv/{layer}.positions", image_id)
    fields = rows.row(f"pfv/{layer}.receptive_fields", image_id)
    if positions is None or fields is None:
        return None
    at = np.flatnonzero((positions.values == (exemplar["row"], exemplar["column"])).all(axis=1))
    return np.asarray(fields.values[at[0]], np.float32) if len(at) else None


def _map_size(results: Results, layer: str) -> tuple[int, int] | None:
    """Rows and columns of a layer's positions."""
    name = f"pfv/{layer}.positions"
    if name not in results.array_names():
        return None
    size = results.xarray(name).attrs["map_size"]
    return int(size[0]), int(size[1])


def _graphs(context: Context, edges: pa.Table) -> list[GraphRequest]:
    """For each extractor of the graph stage, the classes that most images were explained for."""
    concepts = context.config.concepts
    if not edges.num_rows:
        return []
    images = edges.group_by(["class_id"]).aggregate([("image_id", "count_distinct")]).to_pylist()
    ranked = sorted(images, key=lambda row: (-row["image_id_count_distinct"], row["class_id"]))
    classes = tuple(row["class_id"] for row in ranked[:CLASSES_TOGETHER])
    method = concepts.graph_or_default.edges.id
    return [GraphRequest(extractor, method, classes) for extractor in concepts.graph_extractors]
