"""The page about one picture's diagnosis: its graph, the concepts in it, and what an attack changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from storage.schema import rows_to_table
from tasks.concept_graph import edge_rows, joined, score_rows
from tasks.diagnosis import Diagnosis
from tasks.pages import template
from tasks.report.concept_data import read_exemplars
from tasks.report.concept_graph import GraphRequest
from tasks.report.concepts import ConceptTables, concept_section, shown_concepts
from tasks.report.tiles import data_uri
from xai_core.concepts.graph import ConceptGraph

# Under which numbers the graphs of the picture, and of the attacked one, stand in the rows of the page.
PLAIN, ATTACKED = 0, 1
# Of each layer, the concepts that an attack changed most.
MOST_CHANGED = 8


@dataclass(frozen=True)
class Change:
    """What an attack did to a concept: its importance for each class before and after."""

    layer: str
    concept: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    note: str


def diagnosis_page(found: Diagnosis, name: str) -> str:
    """One HTML file that loads nothing; ``name`` is the picture's."""
    studied = found.studied
    names = dict(enumerate(studied.class_names))
    titles = {PLAIN: name} if found.attack is None else {PLAIN: name, ATTACKED: f"{name} after the attack"}
    graphs = [found.graph, *([found.attack.comparison.after] if found.attack else [])]
    tables = _tables(found, graphs)
    asked = [
        GraphRequest(studied.extractor, studied.graph.edges.id, found.classes, image_id=number, title=title)
        for number, title in titles.items()
    ]
    keys = shown_concepts(tables, asked, names)
    exemplars = read_exemplars(studied.model, studied.config.dataset, studied.results, keys)
    section = concept_section(tables, class_names=names, exemplars=exemplars, graphs=asked)
    return template("diagnosis.html.j2").render(
        name=name,
        model=studied.model.spec.name,
        classes=[names[one] for one in found.classes],
        pictures=_pictures(found),
        routes=found.route_lines(),
        changes=changes(found),
        concepts=section,
    )


def _tables(found: Diagnosis, graphs: list[ConceptGraph]) -> ConceptTables:
    studied = found.studied
    scores = [
        rows
        for number, graph in enumerate(graphs)
        for rows in score_rows(graph, np.array([number]), studied.extractor)
    ]
    edges = [
        rows
        for number, graph in enumerate(graphs)
        for rows in edge_rows(graph, np.array([number]), studied.extractor, studied.graph.edges.id)
    ]
    concepts = studied.results.table("concepts").drop_columns("run_id")
    return ConceptTables(
        concepts=concepts.filter(pa.compute.equal(concepts["extractor"], studied.extractor)),
        concept_scores=rows_to_table("concept_scores", joined(scores)),
        concept_edges=rows_to_table("concept_edges", joined(edges)),
    )


def _pictures(found: Diagnosis) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [{"title": "the picture", "uri": data_uri(found.picture), "top": found.top}]
    if found.attack is not None:
        title = f"after an attack of {found.attack.epsilon:g}/255"
        shown.append({"title": title, "uri": data_uri(found.attack.picture), "top": found.attack.top})
    return shown


def changes(found: Diagnosis) -> list[Change]:
    """The concepts that the attack changed most, layer by layer."""
    if found.attack is None:
        return []
    comparison = found.attack.comparison
    listed = []
    for layer in found.studied.layers:
        before, after = comparison.before.nodes[layer], comparison.after.nodes[layer]
        moved = (after.importance - before.importance)[0].abs().amax(dim=1).nan_to_num(-1.0)
        for place in moved.argsort(descending=True, stable=True)[:MOST_CHANGED].tolist():
            if moved[place] < 0:
                continue
            notes = {"appeared": comparison.appeared[layer], "vanished": comparison.vanished[layer]}
            listed.append(
                Change(
                    layer,
                    int(before.concepts[0, place]),
                    tuple(before.importance[0, place].tolist()),
                    tuple(after.importance[0, place].tolist()),
                    ", ".join(word for word, where in notes.items() if bool(where[0, place])),
                )
            )
    return listed
