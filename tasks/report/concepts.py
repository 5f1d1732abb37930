"""The report's section about concepts: dictionaries, the strongest concepts, their graphs, and how faithful."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from tasks.pages import template
from tasks.report.concept_areas import AreaTable, Measure, area_tables
from tasks.report.concept_charts import ChartGroup, InsertionCurves, insertion_charts, training_charts
from tasks.report.concept_graph import Graph, GraphRequest, concept_graph
from tasks.report.concept_pictures import GraphCard, graph_card
from tasks.report.concept_rows import (
    ConceptKey,
    DictionaryQuality,
    RankedConcept,
    Rows,
    as_table,
    dictionary_qualities,
    ranked_concepts,
    strongest,
)
from tasks.report.concept_sheets import ConceptCard, cards_of, thumbnails
from xai_core.render.concept_sheet import Exemplars

# Cards a layer, beside those that a graph leads to.
STRONGEST = 6

INSERTION_MEASURES = (Measure("insertion", "insertion", True), Measure("deletion", "deletion", False))
CAFE_MEASURES = (Measure("insertion", "insertion", True), Measure("locality", "locality", None))


@dataclass(frozen=True)
class ConceptTables:
    """Rows of the concept tables, each as in the store or empty; see ``COLUMNS`` for what they hold."""

    concepts: Rows = ()
    concept_scores: Rows = ()
    concept_edges: Rows = ()
    sae_training: Rows = ()
    concept_insertion: Rows = ()
    cafe: Rows = ()

    def table(self, name: str) -> pa.Table:
        """One of them, its columns checked."""
        return as_table(name, getattr(self, name))


@dataclass(frozen=True)
class LayerCards:
    """The cards of one layer."""

    layer: str
    cards: tuple[ConceptCard, ...]


@dataclass(frozen=True)
class ConceptSection:
    """All that the section shows. ``figures`` are its charts in the order of the page."""

    dictionaries: tuple[DictionaryQuality, ...]
    graphs: tuple[GraphCard, ...]
    layers: tuple[LayerCards, ...]
    insertion: tuple[AreaTable, ...]
    cafe: tuple[AreaTable, ...]
    charts: Mapping[str, ChartGroup] = field(default_factory=dict)
    #: Why there is no dictionary, where there is none.
    nothing: str = "No dictionary was fitted."

    @property
    def figures(self) -> list[Any]:
        """Plotly figures, one for each ``.plot`` of the section in the order in which they stand."""
        return [json.loads(chart.json) for group in self.charts.values() for chart in group.charts]


def concept_section(
    tables: ConceptTables,
    *,
    class_names: Mapping[int, str],
    exemplars: Mapping[ConceptKey, Exemplars] | None = None,
    graphs: Sequence[GraphRequest] = (),
    curves: Mapping[str, InsertionCurves] | None = None,
) -> ConceptSection:
    """Gathers the section from rows and arrays; what there are no rows of is left out.

    Args:
        class_names: by class id; exemplars: see :func:`tasks.report.concept_sheets.exemplars_of`, for the
            concepts that :func:`shown_concepts` names; graphs: which to draw.
        curves: of concept insertion and deletion by attribution method.

    Raises:
        UsageError: rows without a column of their table, or a graph that cannot be drawn.
    """
    scores, edges = tables.table("concept_scores"), tables.table("concept_edges")
    given = exemplars or {}
    drawn = [
        (request, graph)
        for request in graphs
        if (graph := concept_graph(scores, edges, request, class_names)) is not None
    ]
    concepts = tables.table("concepts")
    sizes = {(row["layer"], row["extractor"], row["concept_id"]): row["size"] for row in concepts.to_pylist()}
    cards = cards_of(_ranked(scores, [graph for _, graph in drawn], graphs), given, sizes, class_names)
    anchors = {card.key: card.anchor for card in cards}
    small = thumbnails({key: given[key] for key in anchors})
    found = {
        "insertion": insertion_charts(curves or {}),
        "training": training_charts(tables.table("sae_training")),
    }
    return ConceptSection(
        dictionaries=tuple(dictionary_qualities(concepts)),
        graphs=tuple(
            graph_card(number, request, graph, class_names, anchors, small)
            for number, (request, graph) in enumerate(drawn)
        ),
        layers=_by_layer(cards),
        insertion=tuple(
            area_tables(
                tables.table("concept_insertion"),
                "attribution_method",
                INSERTION_MEASURES,
                ("extractor", "source_layer", "target_layer"),
                lambda of: f"{of['source_layer']} → {of['target_layer']}, {of['extractor']}",
            )
        ),
        cafe=tuple(
            area_tables(
                tables.table("cafe"),
                "attributor",
                CAFE_MEASURES,
                ("extractor", "layer"),
                lambda of: f"{of['layer']}, {of['extractor']}",
            )
        ),
        charts={name: group for name, group in found.items() if group is not None},
    )


def shown_concepts(
    tables: ConceptTables, graphs: Sequence[GraphRequest], class_names: Mapping[int, str]
) -> list[ConceptKey]:
    """The concepts that the section will show: those whose exemplars it needs."""
    scores, edges = tables.table("concept_scores"), tables.table("concept_edges")
    drawn = [concept_graph(scores, edges, request, class_names) for request in graphs]
    ranked = _ranked(scores, [graph for graph in drawn if graph is not None], graphs)
    return list(dict.fromkeys(one.key for one in ranked))


def _ranked(scores: pa.Table, graphs: Sequence[Graph], requests: Sequence[GraphRequest]) -> list[RankedConcept]:
    """The strongest concepts over all classes, and those in graphs with the attribution to each class."""
    in_graphs = {key for graph in graphs for key in graph.keys.values()}
    found = []
    for extractor in dict.fromkeys(scores["extractor"].to_pylist()):
        classes = dict.fromkeys(
            class_id for request in requests if request.extractor == extractor for class_id in request.classes
        )
        told = [one for class_id in classes for one in ranked_concepts(scores, extractor, class_id)]
        told = [one for one in told if one.key in in_graphs]
        top = strongest(ranked_concepts(scores, extractor), STRONGEST)
        found += [*told, *(one for one in top if one.key not in {other.key for other in told})]
    return found


def _by_layer(cards: Sequence[ConceptCard]) -> tuple[LayerCards, ...]:
    layers = dict.fromkeys((card.key[0], card.key[1]) for card in cards)
    return tuple(
        LayerCards(f"{layer}, {extractor}", tuple(card for card in cards if card.key[:2] == (layer, extractor)))
        for layer, extractor in layers
    )


def render_concepts(section: ConceptSection) -> Markup:
    """The section as HTML; styles and script are in ``concepts.css`` and ``concepts.js``."""
    return Markup(template("concepts.html.j2").render(concepts=section))
