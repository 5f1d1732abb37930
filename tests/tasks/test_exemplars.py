"""The exemplars stage on drawn pictures against a sort of all stored vectors, by image and shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from storage.commits import CommitRecord, Unit
from storage.store import Store, open_store
from tasks.config import StudyConfig
from tasks.execute import execute
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.sources import open_source
from tasks.study import Study
from tests.conftest import TINY, config_with

IMAGES = 9
LAYER = "blocks.2"
EXTRACTORS = ("bisecting_kmeans", "sae")
STUDY = config_with(
    TINY,
    dataset={"kind": "demo", "images": IMAGES},
    concepts={
        "layers": [LAYER],
        "per_image": 4,
        "atoms": 3,
        "extractors": ["bisecting_kmeans", {"name": "sae", "steps": 30}],
        "receptive_fields": None,
        "exemplars": {"count": 5},
    },
)
CHAIN = ("manifest", "predict", "pfv", "dictionary", "exemplars")


class Chain:
    """A store in which the stages up to exemplars ran, and their records."""

    def __init__(self, document: dict[str, Any], root: Path) -> None:
        open_source.cache_clear()
        self.store: Store = open_store(root, create=True)
        self.study = Study(StudyConfig.model_validate(document), self.store)
        planner = Planner(self.study)
        self.records: dict[Unit, CommitRecord] = {}
        for name in CHAIN:
            works = to_run(planner.stage(STAGES[name]))
            for work in works:
                execute(work)
                record = self.store.done(work.unit, work.key)
                assert record is not None
                self.records[work.unit] = record

    def of_stage(self, name: str) -> list[CommitRecord]:
        return [record for unit, record in self.records.items() if unit.stage == name]

    def array(self, name: str) -> np.ndarray:
        return np.concatenate([self.store.read_array(one, f"{LAYER}.{name}") for one in self.of_stage("pfv")])

    def rows(self, extractor: str) -> list[dict[str, Any]]:
        record = self.records[Unit("exemplars", f"{LAYER} / {extractor_id(extractor)}", 0)]
        return self.store.read_table(record, "concept_exemplars").to_pylist()


def extractor_id(name: str) -> str:
    return {"sae": "sae[steps=30]"}.get(name, name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(STUDY, tmp_path_factory.mktemp("exemplars") / "store")


def scores_of(chain: Chain, extractor: str) -> np.ndarray:
    """How near every stored vector is to each concept, ``[images, n, K]`` in float64, from the files alone."""
    unit = Unit("dictionary", f"{LAYER} / {extractor_id(extractor)}", 0)
    held = {
        name: tensor.double().numpy()
        for name, tensor in load_file(chain.store.read_file(chain.records[unit], "dictionary")).items()
    }
    vectors = chain.array("vectors").astype(np.float64)
    if extractor == "sae":
        codes = np.maximum(0, vectors @ held["weight"].T + held["bias"])
        return np.where(codes > 0, codes, -np.inf)
    unit_atoms = held["atoms"] / np.linalg.norm(held["atoms"], axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=2, keepdims=True) @ unit_atoms.T


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_rows_are_the_nearest_vector_of_each_of_the_nearest_images(chain: Chain, extractor: str) -> None:
    scores, positions, relevance = scores_of(chain, extractor), chain.array("positions"), chain.array("relevance")
    rows = chain.rows(extractor)
    assert {row["concept_id"] for row in rows} <= {0, 1, 2}
    for concept in range(3):
        best = scores[:, :, concept].max(axis=1)
        expected = [image for image in np.argsort(-best, kind="stable")[:5] if best[image] > -np.inf]
        found = [row for row in rows if row["concept_id"] == concept]
        assert [row["rank"] for row in found] == list(range(len(expected)))
        assert [row["image_id"] for row in found] == expected
        for row in found:
            image = row["image_id"]
            draw = int(scores[image, :, concept].argmax())
            assert [row["row"], row["column"]] == positions[image, draw].tolist()
            assert row["relevance"] == pytest.approx(float(relevance[image, draw]))
            assert row["score"] == pytest.approx(float(best[image]), rel=1e-4, abs=1e-5)
            assert (row["layer"], row["extractor"]) == (LAYER, extractor_id(extractor))
    assert len(rows) >= 5


@pytest.mark.parametrize("size", [2, 100])
def test_shards_change_no_exemplar(chain: Chain, size: int, tmp_path: Path) -> None:
    other = Chain(config_with(STUDY, run={"shard_size": size}), tmp_path / "store")
    found, expected = (one.rows("bisecting_kmeans") for one in (other, chain))
    for one, same in zip(found, expected, strict=True):
        assert {**one, "score": 0, "relevance": 0} == {**same, "score": 0, "relevance": 0}
        assert one["score"] == pytest.approx(same["score"], rel=1e-4)
        assert one["relevance"] == pytest.approx(same["relevance"], rel=1e-3, abs=1e-5)


def test_an_image_may_give_several_where_that_is_asked_for(chain: Chain, tmp_path: Path) -> None:
    concepts = {"exemplars": {"count": 12, "distinct_images": False}, "extractors": ["bisecting_kmeans"]}
    rows = Chain(config_with(STUDY, concepts=concepts), tmp_path / "store").rows("bisecting_kmeans")
    scores = scores_of(chain, "bisecting_kmeans")
    for concept in range(3):
        found = [row for row in rows if row["concept_id"] == concept]
        assert len(found) == 12
        assert len({row["image_id"] for row in found}) < 12
        best = -np.sort(-scores[:, :, concept].flatten())[:12]
        np.testing.assert_allclose([row["score"] for row in found], best, rtol=1e-4, atol=1e-5)


def test_too_few_vectors_for_a_dictionary_leave_no_exemplars(tmp_path: Path) -> None:
    single = config_with(
        STUDY, dataset={"images": 1}, concepts={"per_image": 1, "class_token": False, "atoms": None}
    )
    assert Chain(single, tmp_path / "store").rows("bisecting_kmeans") == []


def test_another_number_of_exemplars_fits_no_dictionary_again(chain: Chain) -> None:
    document = config_with(STUDY, concepts={"exemplars": {"count": 2}})
    planner = Planner(Study(StudyConfig.model_validate(document), chain.store))
    again = {name: to_run(planner.stage(STAGES[name])) for name in CHAIN}
    assert {name: len(works) for name, works in again.items() if works} == {"exemplars": 2}
