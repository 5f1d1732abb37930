"""What a change makes run again: exactly the stages that depend on it, counted by executions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storage.store import open_store
from tasks.config import StudyConfig
from tasks.plan import Planned, Planner
from tasks.study import Study
from tests.conftest import TINY, Ran, config_with, write_folder

Chain = Callable[[dict[str, Any], Path], Ran]
ALL = {
    "manifest": 3,
    "predict": 3,
    "parts": 3,
    "pfv": 3,
    "dictionary": 1,
    "exemplars": 1,
    "attribute": 9,
    "metrics": 9,
    "report": 1,
}


@pytest.fixture(scope="module")
def base(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The tiny study, done once."""
    return run_chain(TINY, tmp_path_factory.mktemp("base") / "store")


@pytest.fixture
def copy(base: Ran, tmp_path: Path) -> Path:
    """A copy of the finished store."""
    return Path(shutil.copytree(base.store.root, tmp_path / "store"))


def plan(document: dict[str, Any], root: Path) -> list[Planned]:
    return Planner(Study(StudyConfig.model_validate(document), open_store(root))).all()


def due(planned: list[Planned]) -> dict[tuple[str, str], str]:
    """Reason and detail of what would run, by stage and variant."""
    return {
        (one.unit.stage, one.unit.variant): f"{one.reason}: {one.detail}"
        for one in planned
        if one.reason is not None
    }


def test_a_new_store_runs_everything_once(base: Ran) -> None:
    assert base.counts == ALL


def test_again_runs_nothing(run_chain: Chain, copy: Path) -> None:
    assert due(plan(TINY, copy)) == {}
    assert run_chain(TINY, copy).counts == {}


def test_reasons_name_the_changed_key(copy: Path) -> None:
    steps = due(plan(config_with(TINY, metrics=[{"name": "insertion", "steps": 2}, "p_deletion"]), copy))
    assert steps["metrics", "grad_cam"].startswith("config: config.metrics: ")
    cut = due(plan(config_with(TINY, parts={"k": 2}), copy))
    assert cut["parts", ""] == "config: config.k: 4 -> 2"
    assert cut["attribute", "kl_hessian"].startswith("upstream: upstream.parts #")
    assert ("attribute", "grad_cam") not in cut
    added = due(plan(config_with(TINY, methods=["grad_cam", {"name": "kl_hessian", "gamma": 2.0}]), copy))
    assert added["attribute", "kl_hessian[gamma=2.0]"] == "missing: "


def test_without_a_manifest_everything_waits_for_it(tmp_path: Path) -> None:
    open_store(tmp_path / "new", create=True)
    reasons = due(plan(TINY, tmp_path / "new"))
    assert reasons["manifest", ""] == "missing: "
    assert reasons["metrics", "grad_cam"] == "missing: waits for the manifest"


def test_a_damaged_unit_is_corrupt_and_done_again_alone(run_chain: Chain, base: Ran, copy: Path) -> None:
    rows = base.sql("select * from metrics order by all")
    path = next((copy / "tables" / "metrics").glob("metrics-0000001-*.parquet"))
    path.write_bytes(path.read_bytes()[:-3])
    (found,) = [one for one in plan(TINY, copy) if one.reason is not None]
    assert (found.unit.stage, found.unit.shard, found.reason) == ("metrics", 1, "corrupt")
    assert f"{path.name}: expected" in found.detail
    again = run_chain(TINY, copy)
    assert again.counts == {"metrics": 1}
    assert again.sql("select * from metrics order by all") == rows


def test_a_cut_commit_record_counts_as_not_done(run_chain: Chain, copy: Path) -> None:
    path = next((copy / "commits" / "attribute" / "grad_cam").glob("0000002-*.json"))
    path.write_bytes(path.read_bytes()[:100])
    assert run_chain(TINY, copy).counts == {"attribute": 1}


def test_a_limit_takes_a_prefix_whose_shards_the_whole_set_reuses(
    run_chain: Chain, base: Ran, tmp_path: Path
) -> None:
    small = run_chain(config_with(TINY, dataset={"limit": 8}), tmp_path / "store")
    assert small.counts["metrics"] == 6
    whole = run_chain(TINY, tmp_path / "store")
    assert whole.counts == {
        "manifest": 1,
        "predict": 1,
        "parts": 1,
        "pfv": 1,
        "dictionary": 1,
        "exemplars": 1,
        "attribute": 3,
        "metrics": 3,
        "report": 1,
    }
    assert values(whole) == values(base)


def test_a_limit_inside_a_shard_keeps_that_shard_apart(run_chain: Chain, base: Ran, tmp_path: Path) -> None:
    cut = run_chain(config_with(TINY, dataset={"limit": 6}), tmp_path / "store")
    before = values(cut)
    assert {row[0] for row in before} == set(range(6))
    whole = run_chain(TINY, tmp_path / "store")
    assert whole.counts["metrics"] == 6
    assert values(whole) == values(base)
    assert values(cut) == before
    assert due(plan(config_with(TINY, dataset={"limit": 6}), tmp_path / "store")) == {}


def values(ran: Ran) -> list[tuple[Any, ...]]:
    rows = ran.sql("select image_id, method, metric, value from metrics order by 1, 2, 3")
    return [(row["image_id"], row["method"], row["metric"], row["value"]) for row in rows]


@pytest.fixture
def folder_study(tmp_path: Path) -> dict[str, Any]:
    folder = write_folder(tmp_path / "images", {"a": 3, "b": 3})
    return config_with(
        TINY,
        dataset={"kind": "folder", "path": str(folder), "images": 1},
        methods=["grad_cam"],
        run={"shard_size": 2},
    )


def test_images_that_change_rerun_their_shard_and_touched_ones_only_their_manifest(
    run_chain: Chain, folder_study: dict[str, Any], tmp_path: Path
) -> None:
    store, folder = tmp_path / "store", tmp_path / "images"
    run_chain(folder_study, store)
    os.utime(folder / "a" / "000.png", (1, 1))
    touched = run_chain(folder_study, store)
    assert touched.counts == {"manifest": 1, "report": 1}
    shutil.copyfile(folder / "b" / "002.png", folder / "a" / "000.png")
    assert {reason for key, reason in due(plan(folder_study, store)).items() if key[0] == "manifest"}
    changed = run_chain(folder_study, store)
    assert changed.counts == {
        "manifest": 1,
        "predict": 1,
        "parts": 1,
        "pfv": 1,
        "dictionary": 1,
        "exemplars": 1,
        "attribute": 1,
        "metrics": 1,
        "report": 1,
    }


def test_a_moved_folder_reruns_its_manifest_alone(
    run_chain: Chain, folder_study: dict[str, Any], tmp_path: Path
) -> None:
    run_chain(folder_study, tmp_path / "store")
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = config_with(folder_study, dataset={"path": str(tmp_path / "moved")})
    assert run_chain(moved, tmp_path / "store").counts == {"manifest": 3, "report": 1}


def test_another_folder_of_equal_names_sizes_and_times_is_not_mistaken(
    run_chain: Chain, folder_study: dict[str, Any], tmp_path: Path
) -> None:
    for name, level in (("images", 40), ("other", 200)):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name / "a").mkdir(parents=True)
        for index in range(2):
            path = tmp_path / name / "a" / f"{index}.bmp"
            Image.new("RGB", (8, 8), (level, index, 0)).save(path)
            os.utime(path, (1, 1))
    study = config_with(folder_study, concepts={"layers": []})
    first = run_chain(study, tmp_path / "store")
    other = run_chain(config_with(study, dataset={"path": str(tmp_path / "other")}), tmp_path / "store")
    assert other.counts["predict"] == 1
    digests = "select sha256 from manifest order by image_id"
    assert first.sql(digests) != other.sql(digests)
