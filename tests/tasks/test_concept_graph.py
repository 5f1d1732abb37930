"""Concept graphs, latents and diagnoses of a study, against what xai_core gives for the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage import sql
from tasks.diagnosis import Studied, diagnose, open_study
from tasks.diagnosis_page import changes, diagnosis_page
from tests.conftest import TINY, Ran, config_with
from xai_core.concepts.cafe import explain_latents
from xai_core.concepts.graph import concept_graph, strongest_routes
from xai_core.errors import UsageError
from xai_core.synthetic import render

Chain = Callable[[dict[str, Any], Path], Ran]
LAYERS = ["blocks.1", "blocks.2"]
IMAGES = 5
SAE = "sae[steps=40]"
STUDY = config_with(
    TINY,
    dataset={"kind": "demo", "images": 12, "seed": 1, "order_seed": None},
    methods=["grad_cam"],
    metrics=[],
    concepts={
        "layers": LAYERS,
        "per_image": 6,
        "atoms": 8,
        "receptive_fields": {"size": 4, "attributor": "gradient"},
        "extractors": ["bisecting_kmeans", {"name": "sae", "steps": 40}],
        "graph": {"images": IMAGES, "concepts": 3, "compare": ["gradient_x_input", "lrp"], "compared_children": 2},
        "cafe": {"latents": 3, "images": 2, "attributors": ["gradient"], "steps": 4},
    },
)


@pytest.fixture(scope="module")
def ran(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(STUDY, tmp_path_factory.mktemp("concept_graph") / "store")


@pytest.fixture(scope="module")
def studied(ran: Ran) -> Studied:
    return open_study(ran.store, ran.run_id, None, "cpu")


def rows(ran: Ran, table: str) -> list[dict[str, Any]]:
    return ran.store.results(ran.run_id).table(table).drop_columns("run_id").to_pylist()


def pictures(studied: Studied, image_ids: list[int]) -> torch.Tensor:
    drawn = [studied.model.preprocess(Image.fromarray(render(1, image).image)) for image in image_ids]
    return torch.stack(drawn)


def test_graphs_are_those_of_the_first_images_by_the_studys_first_dictionaries(ran: Ran, studied: Studied) -> None:
    images = pictures(studied, list(range(IMAGES)))
    classes = studied.model(images).argmax(dim=1, keepdim=True)
    graph = concept_graph(
        studied.model, images, classes, LAYERS, studied.dictionaries, options=studied.graph.options()
    )
    scores, edges = rows(ran, "concept_scores"), rows(ran, "concept_edges")
    assert {row["extractor"] for row in (*scores, *edges)} == {"bisecting_kmeans"}
    assert {row["image_id"] for row in scores} == set(range(IMAGES))
    for row in scores:
        nodes = graph.nodes[row["layer"]]
        assert row["class_id"] == classes[row["image_id"], 0]
        assert row["concept_id"] == nodes.concepts[row["image_id"], row["rank"]]
        assert row["attribution"] == pytest.approx(
            nodes.importance[row["image_id"], row["rank"], 0].item(), rel=1e-3, abs=1e-5
        )
    assert len(scores) == sum(int(nodes.there.sum()) for nodes in graph.nodes.values())
    assert len(edges) == sum(int((~weights.isnan()).sum()) for weights in graph.edges.values())
    to_class = [row for row in edges if row["target_layer"] == "classifier"]
    assert {(row["image_id"], row["target"]) for row in to_class} == {
        (image, int(classes[image, 0])) for image in range(IMAGES)
    }


def test_another_shard_size_gives_the_same_graphs(run_chain: Chain, ran: Ran, tmp_path: Path) -> None:
    other = run_chain(config_with(STUDY, run={"shard_size": 3}), tmp_path / "store")
    for table in ("concept_scores", "concept_edges", "cafe"):
        told, again = (sorted(map(spelled, rows(one, table))) for one in (ran, other))
        assert [names for names, _ in told] == [names for names, _ in again]
        for (_, values), (_, others) in zip(told, again, strict=True):
            assert values == pytest.approx(others, rel=1e-2, abs=1e-4, nan_ok=True)


def spelled(row: dict[str, Any]) -> tuple[tuple[str, ...], list[float]]:
    """What a row is about, and its numbers."""
    names = tuple(f"{key}={value}" for key, value in row.items() if not isinstance(value, float))
    return names, [value for value in row.values() if isinstance(value, float)]


def test_areas_of_concept_insertion_are_those_of_the_kept_curves(ran: Ran) -> None:
    areas, points = rows(ran, "concept_insertion"), rows(ran, "concept_curves")
    assert {row["attribution_method"] for row in areas} == {"gradient_x_input", "lrp"}
    assert all((row["insertion"] is None) == (row["reason"] is not None) for row in areas)
    about = ("image_id", "extractor", "attribution_method", "source_layer", "target_layer", "target")
    for row in areas:
        for curve in ("insertion", "deletion"):
            own = [p for p in points if p["curve"] == curve and all(p[key] == row[key] for key in about)]
            if row[curve] is None:
                assert not own
                continue
            own.sort(key=lambda point: point["step"])
            fraction, alignment = ([point[key] for point in own] for key in ("fraction", "alignment"))
            assert (fraction[0], fraction[-1]) == (0.0, 1.0)
            assert np.trapezoid(alignment, fraction) == pytest.approx(row[curve], rel=1e-5)


def test_latents_are_explained_on_their_strongest_images(ran: Ran) -> None:
    found = rows(ran, "cafe")
    exemplars = [row for row in rows(ran, "concept_exemplars") if row["extractor"] == SAE and row["rank"] < 2]
    listed = {(row["layer"], row["concept_id"], row["image_id"]) for row in exemplars}
    assert {row["attributor"] for row in found} == {"activation", "gradient"}
    assert {(row["layer"], row["concept_id"], row["image_id"]) for row in found} <= listed
    assert all(len({row["concept_id"] for row in found if row["layer"] == layer}) <= 3 for layer in LAYERS)
    studied = open_study(ran.store, ran.run_id, SAE, "cpu")
    for row in found:
        explained = explain_latents(
            studied.model,
            pictures(studied, [row["image_id"]]),
            torch.tensor([0]),
            row["layer"],
            studied.dictionaries[row["layer"]],
            torch.tensor([row["concept_id"]]),
        )
        assert row["value"] == pytest.approx(explained.value.item(), rel=1e-3, abs=1e-5)


def test_which_concepts_feed_a_class_most_is_one_query(ran: Ran) -> None:
    answer = sql.query(
        ran.store,
        "select concept_id, sum(attribution) as feeds from concept_scores "
        "where class_id = (select min(class_id) from concept_scores) and layer = 'blocks.2' "
        "group by all order by feeds desc, concept_id limit 1",
    ).to_pylist()
    scores = rows(ran, "concept_scores")
    first = min(row["class_id"] for row in scores)
    sums: dict[int, float] = {}
    for row in scores:
        if (row["class_id"], row["layer"]) == (first, "blocks.2"):
            sums[row["concept_id"]] = sums.get(row["concept_id"], 0.0) + row["attribution"]
    best = min(sums, key=lambda concept: (-sums[concept], concept))
    assert (answer[0]["concept_id"], answer[0]["feeds"]) == (best, pytest.approx(sums[best]))


@pytest.mark.parametrize(
    ("section", "stages"),
    [
        ({"graph": {**STUDY["concepts"]["graph"], "concepts": 2}}, {"concept_graph": 2, "report": 1}),
        ({"cafe": {**STUDY["concepts"]["cafe"], "steps": 3}}, {"cafe": 2, "report": 1}),
        ({"graph": None}, {"report": 1}),
    ],
)
def test_what_changes_runs_again_and_nothing_else(
    run_chain: Chain, ran: Ran, section: dict[str, Any], stages: dict[str, int]
) -> None:
    counts = run_chain(config_with(STUDY, concepts=section), ran.store.root).counts
    # Shards without an image of the graph's are units too.
    assert {name: min(count, 2) for name, count in counts.items()} == stages


def test_the_report_shows_graph_concepts_and_what_was_tested(ran: Ran) -> None:
    (record,) = [one for one in ran.store.results(ran.run_id).records() if one.unit.stage == "report"]
    page = ran.store.read_file(record, "report").read_text()
    for said in (
        "Strongest concepts",
        "<svg",
        "gradient_x_input",
        "Evidence of single latents",
        "bisecting_kmeans",
    ):
        assert said in page


# Diagnosis.


def toy(index: int) -> Image.Image:
    return Image.fromarray(render(1, index).image)


def test_a_diagnosis_is_the_graph_of_both_classes_and_names_their_routes(studied: Studied) -> None:
    found = diagnose(studied, toy(20), [0, 4])
    graph = concept_graph(
        studied.model,
        studied.model.preprocess(toy(20)).unsqueeze(0),
        torch.tensor([[0, 4]]),
        LAYERS,
        studied.dictionaries,
        options=studied.graph.options(),
    )
    routes = strongest_routes(graph)
    assert torch.equal(found.routes.concepts, routes.concepts)
    for place, name in enumerate((studied.class_names[0], studied.class_names[4])):
        told = next(line for line in found.route_lines() if line.startswith(f"{name}: "))
        concepts = routes.concepts[0, place].tolist()
        expected = "no route" if concepts[0] < 0 else f"blocks.1 {concepts[0]} -> blocks.2 {concepts[1]}"
        assert expected in told


def test_an_attack_is_shown_with_what_it_changed(studied: Studied) -> None:
    found = diagnose(studied, toy(20), [0, 4], epsilon=8.0)
    assert found.attack is not None
    moved = found.attack.picture.astype(int) - found.picture.astype(int)
    assert 0 < np.abs(moved).max() <= 9
    listed = changes(found)
    assert {row.layer for row in listed} == set(LAYERS)
    assert all(len(row.before) == len(row.after) == 2 for row in listed)
    page = diagnosis_page(found, "toy.png")
    for said in ("toy.png after the attack", "What the attack changed", studied.class_names[4], "<svg"):
        assert said in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_classes_are_found_by_number_and_name(studied: Studied) -> None:
    assert studied.class_of("3") == 3
    assert studied.class_of(studied.class_names[5].upper()) == 5
    with pytest.raises(UsageError, match=r"--classes: expected a class of vitrine_demo_vit .* got 'walkin bird'"):
        studied.class_of("walkin bird")
    with pytest.raises(UsageError, match=r"got '99'"):
        studied.class_of("99")


def test_what_has_no_dictionary_cannot_diagnose(run_chain: Chain, ran: Ran, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--extractor: expected one of run .*bisecting_kmeans.*, got nmf"):
        open_study(ran.store, ran.run_id, "nmf", "cpu")
    with pytest.raises(UsageError, match=r"--run: expected a run of"):
        open_study(ran.store, "unknown", None, "cpu")
    bare = run_chain(config_with(STUDY, concepts={"layers": [], "graph": None, "cafe": None}), tmp_path / "store")
    with pytest.raises(UsageError, match=r"it has no dictionaries.*names concepts.layers"):
        open_study(bare.store, bare.run_id, None, "cpu")
