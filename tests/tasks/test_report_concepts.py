"""The report's section about concepts: its numbers are those of slow twins, and what rows hold stays text."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.report.concept_areas import Measure, area_tables
from tasks.report.concept_charts import InsertionCurves, curves_of, insertion_charts, training_charts
from tasks.report.concept_graph import SHARED, Graph, GraphRequest, concept_graph
from tasks.report.concept_rows import as_table, dictionary_qualities, ranked_concepts, strongest
from tasks.report.concept_sheets import anchor_of, cards_of, exemplars_of
from tasks.report.concepts import ConceptSection, ConceptTables, concept_section, render_concepts, shown_concepts
from xai_core.errors import UsageError

HOSTILE = '<b>x & "y"'
LAYERS = ("early", HOSTILE, "late")
EXTRACTOR, OTHER, METHOD = "bisecting_kmeans", "sae[k=8]", "integrated_gradients"
CLASSES = {4: "tiger cat", 7: "boxer </script>"}
IMAGES, TOP = 6, 4


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def score_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The strongest concepts of every image and class, other ones for every image."""
    generator = random(seed)
    return [
        {
            "image_id": image,
            "layer": layer,
            "extractor": extractor,
            "class_id": class_id,
            "concept_id": int(concept),
            "rank": rank,
            "attribution": float(generator.normal(0.5)),
            "coefficient": 1.0,
        }
        for image in range(IMAGES)
        for extractor in (EXTRACTOR, OTHER)
        for class_id in CLASSES
        if (image + class_id) % 5
        for layer in LAYERS
        for rank, concept in enumerate(generator.choice(9, TOP, replace=False))
    ]


def edge_rows(scores: list[dict[str, Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Edges between those concepts, and from the last ones to their class."""
    found = []
    weight_of: dict[Any, float] = {}
    generator = random(seed)
    top: dict[Any, list[int]] = {}
    for row in scores:
        top.setdefault((row["image_id"], row["extractor"], row["class_id"], row["layer"]), []).append(
            row["concept_id"]
        )
    for image, extractor, class_id, layer in top:
        after = {**dict(pairwise(LAYERS)), LAYERS[-1]: "classifier"}[layer]
        targets = top.get((image, extractor, class_id, after), [class_id])
        for source in top[image, extractor, class_id, layer]:
            for target in targets:
                for method in (METHOD, "lrp"):
                    # What one concept gives another does not depend on the class.
                    weight = weight_of.setdefault(
                        (image, extractor, layer, source, target, method), float(generator.normal())
                    )
                    found.append(
                        {
                            "image_id": image,
                            "extractor": extractor,
                            "attribution_method": method,
                            "source_layer": layer,
                            "target_layer": after,
                            "source": source,
                            "target": target,
                            "class_id": class_id,
                            "weight": weight,
                        }
                    )
    return found


SCORES = score_rows()
EDGES = edge_rows(SCORES)
REQUEST = GraphRequest(EXTRACTOR, METHOD, tuple(CLASSES), per_layer=3)


def graph_of(request: GraphRequest = REQUEST, scores: Any = SCORES, edges: Any = EDGES) -> Graph | None:
    tables = as_table("concept_scores", scores), as_table("concept_edges", edges)
    return concept_graph(*tables, request, CLASSES)


# --- rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_id", [None, *CLASSES])
def test_concepts_are_ranked_by_their_mean_over_all_images(class_id: int | None) -> None:
    rows = [r for r in SCORES if r["extractor"] == EXTRACTOR and class_id in (None, r["class_id"])]
    images = len({row["image_id"] for row in rows})
    found = ranked_concepts(as_table("concept_scores", SCORES), EXTRACTOR, class_id)
    assert [one.key[0] for one in found] == sorted((one.key[0] for one in found), key=LAYERS.index)
    for one in found:
        mine = [row for row in rows if (row["layer"], row["concept_id"]) == (one.key[0], one.key[2])]
        assert one.attribution == pytest.approx(sum(row["attribution"] for row in mine) / images)
        assert (one.present, one.images) == (len({row["image_id"] for row in mine}), images)
    for layer in LAYERS:
        values = [one.attribution for one in found if one.key[0] == layer]
        assert values == sorted(values, reverse=True)
    assert [one.key[0] for one in strongest(found, 2)] == [layer for layer in LAYERS for _ in range(2)]


def concept_rows(**changes: Any) -> list[dict[str, Any]]:
    row = {
        "layer": "a",
        "extractor": "x",
        "atoms": 32,
        "channels": 4,
        "vectors": 100,
        "rel_l2": 0.5,
        "l0_ratio": 0.9,
    }
    return [{**row, "concept_id": at, "size": at, **changes} for at in range(3)]


def test_dictionaries_have_their_numbers_margins_and_the_best_of_each_layer() -> None:
    rows = [
        *concept_rows(rel_l2_error=0.01, l0_ratio_error=None),
        *concept_rows(extractor="y", rel_l2=0.4, l0_ratio=0.8, atoms=20),
        *concept_rows(layer="b", rel_l2=float("nan")),
    ]
    first, second, third = dictionary_qualities(as_table("concepts", pa.Table.from_pylist(rows)))
    assert (first.atoms, first.used, first.note, second.note) == (32, 2, "", "8 C would be 32")
    assert first.rel_l2_margin == pytest.approx(0.0196) and first.l0_ratio_margin is None
    assert (first.best, second.best) == ({"l0_ratio"}, {"rel_l2"})
    # A layer's only dictionary is not its best one.
    assert third.rel_l2 is None and third.best == set()


def test_rows_without_a_column_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cafe: expected the columns image_id, layer.* none named attributor"):
        as_table("cafe", [{"image_id": 1, "layer": "a", "extractor": "x", "concept_id": 1, "insertion": 1.0}])


# --- graphs ---------------------------------------------------------------------------------------------------


def test_nodes_are_the_strongest_of_each_class_and_shared_ones_are_of_several() -> None:
    graph = graph_of()
    assert graph is not None and graph.layers == (*LAYERS, "classifier")
    table = as_table("concept_scores", SCORES)
    top = {c: {one.key: one for one in strongest(ranked_concepts(table, EXTRACTOR, c), 3)} for c in CLASSES}
    groups = {graph.keys[node.id]: node for node in graph.nodes if node.id in graph.keys}
    assert set(groups) == set(top[4]) | set(top[7])
    for key, node in groups.items():
        members = [top[class_id][key] for class_id in CLASSES if key in top[class_id]]
        assert node.weight == pytest.approx(np.mean([one.attribution for one in members]))
        assert node.group == (SHARED if len(members) == 2 else CLASSES[members[0].class_id or 0])
    assert [node.label for node in graph.nodes if node.layer == "classifier"] == list(CLASSES.values())
    assert any(node.group == SHARED for node in graph.nodes)


@pytest.mark.parametrize("image_id", [None, 0, 3])
def test_edges_are_means_over_images_and_count_once_for_several_classes(image_id: int | None) -> None:
    graph = graph_of(replace(REQUEST, image_id=image_id))
    assert graph is not None
    rows = [
        row
        for row in EDGES
        if (row["extractor"], row["attribution_method"]) == (EXTRACTOR, METHOD)
        and image_id in (None, row["image_id"])
    ]
    images = {row["image_id"] for row in rows}
    assert graph.images == len(images)
    found = {(edge.source, edge.target): edge.weight for edge in graph.edges}
    expected: dict[tuple[str, str], float] = {}
    ids = {node.id for node in graph.nodes}
    for row in rows:
        to_class = row["target_layer"] == "classifier"
        ends = (
            f"{row['source_layer']}/{row['source']}",
            f"classifier/class {row['target']}" if to_class else f"{row['target_layer']}/{row['target']}",
        )
        explained = {one["image_id"] for one in rows if one["class_id"] == row["target"]} if to_class else images
        copies = [
            one
            for one in rows
            if all(one[name] == row[name] for name in ("image_id", "source_layer", "source", "target"))
        ]
        if set(ends) <= ids:
            expected[ends] = expected.get(ends, 0.0) + row["weight"] / len(copies) / len(explained)
    assert found == pytest.approx(expected)


def test_chosen_layers_and_one_class() -> None:
    graph = graph_of(replace(REQUEST, layers=LAYERS[1:], classes=(7,)))
    assert graph is not None and graph.layers == (*LAYERS[1:], "classifier")
    assert {node.group for node in graph.nodes} == {CLASSES[7]}


def test_of_many_layers_the_last_ones_are_shown() -> None:
    names = [f"l{index:02d}" for index in range(12)]
    scores = [{**SCORES[0], "layer": name, "concept_id": 1, "class_id": 4} for name in names]
    pairs = zip(names, [*names[1:], "classifier"], strict=True)
    edges = [
        {**EDGES[0], "source_layer": a, "target_layer": b, "source": 1, "target": 1, "class_id": 4}
        for a, b in pairs
    ]
    graph = graph_of(replace(REQUEST, classes=(4,)), scores, edges)
    assert graph is not None and graph.layers == (*names[5:], "classifier") and graph.earlier == 5


def test_without_edges_there_is_no_graph() -> None:
    assert graph_of(edges=()) is None
    assert graph_of(replace(REQUEST, attribution_method="deep_lift")) is None
    assert graph_of(replace(REQUEST, image_id=99)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ()}, "1 to 5 different classes"),
        ({"classes": (4, 4)}, "different classes"),
        ({"per_layer": 7}, "1 to 6 concepts a layer for each of 2 classes, got 7"),
        ({"layers": ("nowhere",)}, "expected layers of .* got nowhere"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        graph_of(replace(REQUEST, **change))


def test_scores_and_edges_of_different_runs_are_refused() -> None:
    with pytest.raises(UsageError, match="one layer without concepts, the last one"):
        graph_of(scores=[row for row in SCORES if row["layer"] != "early"])


# --- areas ----------------------------------------------------------------------------------------------------


def insertion_rows(images: int = 30, seed: int = 2) -> list[dict[str, Any]]:
    generator = random(seed)
    return [
        {
            "image_id": image,
            "source_layer": "early",
            "target_layer": "late",
            "extractor": EXTRACTOR,
            "attribution_method": method,
            "target": target,
            "insertion": None if image == 3 and not at else base + 0.2 * at + 0.01 * float(generator.normal()),
            "deletion": 0.5 + 0.01 * float(generator.normal()),
        }
        for image in range(images)
        for base in [float(generator.normal())]
        for target in range(1 + image % 3)
        for at, method in enumerate(("lrp", METHOD))
    ]


def tables_of(rows: list[dict[str, Any]]) -> Any:
    measures = (Measure("insertion", "insertion", True), Measure("deletion", "deletion", False))
    return area_tables(
        as_table("concept_insertion", rows),
        "attribution_method",
        measures,
        ("source_layer",),
        lambda of: of["source_layer"],
    )


def test_areas_are_means_over_images_of_means_over_targets() -> None:
    rows = insertion_rows()
    (table,) = tables_of(rows)
    assert table.title == "early" and [name for name, _ in table.rows] == ["lrp", METHOD]
    for name, cells in table.rows:
        for measure, cell in zip(("insertion", "deletion"), cells, strict=True):
            by_image = [
                np.mean(values)
                for image in range(30)
                if (
                    values := [
                        row[measure]
                        for row in rows
                        if (row["image_id"], row["attribution_method"]) == (image, name)
                        and row[measure] is not None
                    ]
                )
            ]
            assert (cell.mean, cell.count) == (pytest.approx(np.mean(by_image)), len(by_image))
            error = 1.96 * np.std(by_image, ddof=1) / len(by_image) ** 0.5
            assert cell.low == pytest.approx(np.mean(by_image) - error, abs=0.25 * error)
            assert 0 <= cell.places[1] <= cell.places[0] <= cell.places[2] <= 100
    assert [cells[0].best for _, cells in table.rows] == [False, True]
    assert [cells[0].count for _, cells in table.rows] == [29, 30]


def test_a_lead_is_judged_on_the_same_images() -> None:
    """Images differ by far more than methods do: only the paired difference tells these apart."""
    (table,) = tables_of(insertion_rows())
    (_, (lrp, _)), (_, (best, _)) = table.rows
    assert lrp.high > best.low
    insertion, deletion = table.verdicts
    assert re.match(
        rf"insertion: {METHOD} minus lrp, the two best, is \+0\.20\d \[\+0\.\d+, \+0\.\d+\] on the 29", insertion
    )
    assert insertion.endswith(": told apart.") and deletion.endswith("not told apart.")


def test_one_image_and_no_value_are_shown_as_such() -> None:
    rows = [{**row, "deletion": None} for row in insertion_rows(1)]
    (table,) = tables_of(rows)
    assert all(cells[0].low is None and cells[0].count == 1 for _, cells in table.rows)
    assert all(cells[1].mean is None and not cells[1].best for _, cells in table.rows)
    assert table.verdicts[0].endswith("on 1 image.") and len(table.verdicts) == 1
    shown = render_concepts(concept_section(ConceptTables(concept_insertion=rows), class_names={}))
    assert shown.count("not defined") == 2


# --- charts ---------------------------------------------------------------------------------------------------


def test_curves_are_means_over_images_with_bands_over_images() -> None:
    values = random().random((8, 3, 5))
    values[2, 1] = np.nan
    values[5] = np.nan
    group = insertion_charts({METHOD: InsertionCurves(values, values[::-1])})
    assert group is not None and "Mean over 7 images" in group.hint
    section = ConceptSection((), (), (), (), (), {"insertion": group})
    band, line = section.figures[0]["data"]
    by_image = np.array([np.nanmean(values[image], axis=0) for image in range(8) if image != 5])
    assert line["y"] == pytest.approx(by_image.mean(axis=0).tolist(), abs=2e-4)
    half = 1.96 * by_image.std(axis=0, ddof=1) / 7**0.5
    assert band["y"][:5] == pytest.approx((by_image.mean(axis=0) + half).tolist(), abs=2e-4)
    assert "from" in group.charts[0].description and METHOD in group.charts[0].description


def test_curves_come_from_rows_image_by_image() -> None:
    values = random().random((3, 4, 5))
    values[1, 2] = np.nan
    values[2] = np.nan
    rows = [
        {
            "image_id": 7 * image,
            "extractor": extractor,
            "attribution_method": method,
            "target": target,
            "curve": curve,
        }
        | {"source_layer": "early", "target_layer": "late", "step": step, "fraction": step / 4}
        | {"alignment": None if np.isnan(value := values[image, target, step]) else value * scale}
        for extractor, method, scale in ((EXTRACTOR, METHOD, 1.0), (EXTRACTOR, "lrp", 0.5), (OTHER, METHOD, 9.0))
        for curve in ("insertion", "deletion")
        for step in reversed(range(5))
        for image in range(3)
        for target in range(4)
    ]
    found = curves_of(as_table("concept_curves", rows), EXTRACTOR)
    assert list(found) == [METHOD, "lrp"] and curves_of(as_table("concept_curves", ()), EXTRACTOR) == {}
    expected = np.array([values[0].mean(axis=0), np.nanmean(values[1], axis=0), np.full(5, np.nan)])
    assert np.allclose(found[METHOD].deletion[:, 0], expected, equal_nan=True)
    assert np.allclose(found["lrp"].insertion, 0.5 * found[METHOD].insertion, equal_nan=True)
    group = insertion_charts(found)
    assert group is not None and "Mean over 2 images" in group.hint


def test_training_is_drawn_by_vectors_seen_and_thinned() -> None:
    rows = [
        {
            "layer": "early",
            "extractor": OTHER,
            "step": step,
            "vectors": 64 * step,
            "loss": 1.0,
            "rel_l2": 1 / (1 + step),
        }
        | {"l0": 8.0, "dead": None if step == 0 else 0.1, "learning_rate": 1e-3}
        for step in reversed(range(1000))
    ]
    group = training_charts(as_table("sae_training", rows))
    assert group is not None and [chart.title for chart in group.charts] == ["Relative L2", "L0", "Dead latents"]
    lines = [figure["data"][0] for figure in ConceptSection((), (), (), (), (), {"training": group}).figures]
    assert len(lines[0]["x"]) == 300 and (lines[0]["x"][0], lines[0]["x"][-1]) == (0, 63940)
    assert lines[0]["y"] == sorted(lines[0]["y"], reverse=True)
    assert lines[2]["y"][0] is None
    assert training_charts(as_table("sae_training", ())) is None


# --- cards and the page ---------------------------------------------------------------------------------------


def exemplar_rows(keys: Any) -> pa.Table:
    rows = [
        {
            **dict(zip(("layer", "extractor", "concept_id"), key, strict=True)),
            "rank": rank,
            "image_id": 10 * rank + key[2],
            "row": -1 if rank == 2 else 1,
            "column": 2,
            "score": 1.0 / (1 + rank),
            "relevance": 0.1,
        }
        for key in keys
        for rank in (2, 0, 1)
    ]
    return as_table("concept_exemplars", rows)


def picture_of(image: int) -> np.ndarray | None:
    return None if image % 10 == 8 else random(image).random((3, 32, 32))


@pytest.fixture(scope="module")
def section() -> ConceptSection:
    tables = all_tables()
    requests = [REQUEST, replace(REQUEST, image_id=2, classes=(7,))]
    keys = shown_concepts(tables, requests, CLASSES)
    exemplars = exemplars_of(
        exemplar_rows(keys),
        keys,
        picture_of,
        lambda row: random(row["image_id"]).random((4, 4)),
        dict.fromkeys(LAYERS, (4, 4)),
        {10: HOSTILE},
    )
    curves = {
        name: InsertionCurves(random().random((4, 2, 6)), random().random((4, 2, 6))) for name in (METHOD, "lrp")
    }
    return concept_section(tables, class_names=CLASSES, exemplars=exemplars, graphs=requests, curves=curves)


def all_tables() -> ConceptTables:
    trained = {"step": 1, "vectors": 64, "loss": 1.0, "rel_l2": 0.5, "l0": 8.0, "dead": 0.0, "learning_rate": 0.1}
    return ConceptTables(
        concepts=[row for layer in LAYERS for row in concept_rows(layer=layer, extractor=EXTRACTOR)],
        concept_scores=SCORES,
        concept_edges=pa.Table.from_pylist(EDGES),
        sae_training=[{"layer": HOSTILE, "extractor": OTHER, **trained}],
        concept_insertion=insertion_rows(4),
        cafe=[
            {
                "image_id": i,
                "layer": HOSTILE,
                "extractor": OTHER,
                "concept_id": 1,
                "attributor": a,
                "insertion": 0.1 * i,
            }
            | {"locality": 0.5}
            for i in range(3)
            for a in ("attn_lrp", "activation")
        ],
    )


def test_exemplars_come_best_first_and_without_what_cannot_be_shown() -> None:
    keys = [("early", EXTRACTOR, 3), ("early", EXTRACTOR, 8)]
    found = exemplars_of(
        exemplar_rows([*keys, ("late", EXTRACTOR, 1)]), keys, picture_of,
        lambda row: None if row["rank"] == 1 else np.ones((4, 4)), {"early": (4, 4)}, {3: "a cat"},
    )  # fmt: skip
    assert list(found) == keys[:1]
    assert found[keys[0]].captions == ["image 3\na cat\nscore 1", "image 23\nscore 0.333\nclass token"]
    assert np.array_equal(found[keys[0]].pictures[1], picture_of(23))


def test_every_node_leads_to_its_card_and_every_id_is_there_once(section: ConceptSection) -> None:
    page = render_concepts(section)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = re.findall(r'<a href="#([^"]+)" class="node"', page)
    assert links and set(links) <= set(ids)
    # Concepts 8 have no picture: their nodes are there and lead nowhere.
    assert 'aria-label="concept 8' in page and not any(one.endswith("-8") for one in links)
    assert page.count("<article") == sum(len(layer.cards) for layer in section.layers)
    assert page.count("data:image/jpeg;base64,") == len(re.findall(r"<img |<image ", page))
    assert all(re.search(r'alt="[^"]+"', one) for one in re.findall(r"<img[^>]*>", page))


def test_a_card_tells_the_attribution_to_each_class(section: ConceptSection) -> None:
    cards = {card.key: card for layer in section.layers for card in layer.cards}
    table = as_table("concept_scores", SCORES)
    graph = graph_of()
    assert graph is not None
    key = next(graph.keys[node.id] for node in graph.nodes if node.group == SHARED and not node.id.endswith("/8"))
    for class_id, name in CLASSES.items():
        one = next(one for one in ranked_concepts(table, EXTRACTOR, class_id) if one.key == key)
        told = f"attribution to {name} {one.attribution:.3g}, in {one.present} of {one.images} images"
        assert told in cards[key].note


def test_figures_are_those_of_the_plots_in_their_order(section: ConceptSection) -> None:
    page = render_concepts(section)
    titles = re.findall(r'<h4>([^<]+)</h4><p>[^<]*</p></figcaption>\s*<div class="plot"', page)
    assert titles == [chart.title for group in section.charts.values() for chart in group.charts]
    assert len(section.figures) == page.count('class="plot"') == 5


def test_every_tag_is_closed_and_names_stay_text(section: ConceptSection) -> None:
    page = render_concepts(section)
    assert "<b>x" not in page and "</script>" not in page
    assert html.escape(HOSTILE, quote=False).split("<")[0][:8] in page
    opened: list[str] = []
    for closing, name, end in re.findall(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:\"[^\"]*\"|[^>\"])*?(/?)>", page):
        if closing:
            assert opened.pop() == name
        elif not end and name not in ("img", "br"):
            opened.append(name)
    assert opened == []


def test_nothing_is_loaded_from_anywhere(section: ConceptSection) -> None:
    page = render_concepts(section)
    loads = re.findall(r"""\b(?:src|href|srcset|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    assert loads and all(one.startswith(("data:image/jpeg", "#")) for one in loads)


def test_a_section_of_nothing_says_so() -> None:
    nothing = concept_section(ConceptTables(), class_names={}, graphs=[REQUEST])
    page = render_concepts(nothing)
    assert "No dictionary was fitted" in page
    assert nothing.figures == [] and page.count("<h3") == 0


def test_the_same_section_twice(section: ConceptSection) -> None:
    assert render_concepts(section) == render_concepts(section)
    assert shown_concepts(all_tables(), [REQUEST], CLASSES) == shown_concepts(all_tables(), [REQUEST], CLASSES)


def test_anchors_tell_concepts_apart() -> None:
    keys = [("a.b", "x", 1), ("a-b", "x", 1), ("a_b", "x", 1), ("a", "b-x", 1), ("a", "b", 11), ("a", "b", 1)]
    anchors = {anchor_of(key) for key in keys}
    assert len(anchors) == len(keys) and all(re.fullmatch(r"[\w-]+", one, re.ASCII) for one in anchors)
    assert cards_of([], {}, {}, {}) == []
