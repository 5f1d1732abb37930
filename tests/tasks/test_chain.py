"""The whole chain on real files: what goes in comes out or is set aside, whatever the batches and shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from PIL import Image
from safetensors.torch import load_file, save_file

from storage.commits import Unit
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.errors import StageError
from tasks.execute import execute
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.stage import Outcome
from tasks.study import Study
from tests.conftest import TINY, Ran, config_with
from tests.storage.test_decode import png_claiming
from xai_core.demo_models import weights_path
from xai_core.synthetic import render

Chain = Callable[[dict[str, Any], Path], Ran]
SMALL: dict[str, Any] = {"methods": ["grad_cam", "kl_hessian"], "run": {"max_bad_fraction": 1.0}}


def drawn_folder(root: Path, count: int) -> Path:
    """Demo pictures as an image folder of two classes."""
    for index in range(count):
        path = root / ("even", "odd")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(1, index).image).save(path)
    return root


def study_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base = config_with(TINY, dataset={"kind": "folder", "path": str(folder), "images": 1}, **SMALL)
    return config_with(base, **changes)


def by_path(ran: Ran) -> dict[tuple[str, str, str], float | None]:
    """Every metric value by picture, method and metric."""
    rows = ran.sql("select path, method, metric, value from metrics join images using (run_id, image_id)")
    return {(row["path"], row["method"], row["metric"]): row["value"] for row in rows}


def assert_same(found: dict, expected: dict, atol: float = 5e-5) -> None:
    """Equal but for rounding: of two pixels that tie within it, either may come first in a curve."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=atol), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_folder(tmp_path_factory.mktemp("chain") / "images", 8)


@pytest.fixture(scope="module")
def ran(run_chain: Chain, folder: Path) -> Ran:
    """The chain over eight whole pictures."""
    return run_chain(study_of(folder), folder.parent / "store")


def test_every_stage_counts_what_it_was_given(ran: Ran) -> None:
    for run_id, record in ran.store.records():
        facts = record.facts
        assert run_id == ran.run_id
        assert facts["images"] == facts["ok"] + facts["quarantined"]
    (counts,) = ran.sql("select count(*) as n, count(target) as targets from images")
    assert counts == {"n": 8, "targets": 8}
    assert ran.quarantined == 0


def test_every_picture_has_its_rows(ran: Ran) -> None:
    per_image = {
        "predictions": 5,
        "parts": 4,
        "part_scores": 4,
        "metrics": 2 * 2,
        # insertion: steps 0 to 3; p_deletion: parts 0 to 4
        "curves": 2 * (4 + 5),
    }
    for table, count in per_image.items():
        found = ran.sql(f"select image_id, count(*) as n from {table} group by 1 order by 1")
        assert found == [{"image_id": index, "n": count} for index in range(8)], table


def test_nothing_that_is_stored_is_nan(ran: Ran) -> None:
    for table, column in [
        ("metrics", "value"),
        ("curves", "prob"),
        ("part_scores", "score"),
        ("concepts", "rel_l2"),
    ]:
        (found,) = ran.sql(f"select count(*) as n from {table} where {column} is null or not isfinite({column})")
        assert found == {"n": 0}, table
    for _, record in ran.store.records():
        for name in record.facts.get("arrays", {}):
            assert np.isfinite(ran.store.read_array(record, name)).all(), (record.unit, name)


def test_metrics_lie_within_their_bounds(ran: Ran) -> None:
    rows = ran.sql("select value, lower_bound, upper_bound from metrics join metric_info using (run_id, metric)")
    assert rows
    assert all(row["lower_bound"] <= row["value"] <= row["upper_bound"] for row in rows)


def test_part_areas_add_up_to_the_picture(ran: Ran) -> None:
    found = ran.sql("select sum(area) as area from parts group by image_id")
    assert {row["area"] for row in found} == {128 * 128}


def test_xarray_opens_every_stages_arrays(ran: Ran) -> None:
    records = {record.unit.stage: record for _, record in ran.store.records()}
    for stage in ("parts", "pfv", "attribute"):
        record = records[stage]
        place = next(iter(record.facts["arrays"].values()))["path"]
        opened = xarray.open_zarr((ran.store.root / place).parent, consolidated=False)
        assert opened.sizes["image"] == 8
        assert opened["valid"].values.all()


def test_batch_size_changes_nothing(run_chain: Chain, ran: Ran, folder: Path, tmp_path: Path) -> None:
    for size in (1, 3):
        other = run_chain(study_of(folder, run={"batch_size": size}), tmp_path / str(size))
        assert other.run_id == ran.run_id
        assert_same(by_path(other), by_path(ran))


def test_shard_size_changes_nothing(run_chain: Chain, ran: Ran, folder: Path, tmp_path: Path) -> None:
    other = run_chain(study_of(folder, run={"shard_size": 3}), tmp_path / "store")
    assert other.counts["attribute"] == 6
    assert_same(by_path(other), by_path(ran))


def test_two_studies_in_one_store_share_what_they_have_in_common(
    run_chain: Chain, folder: Path, tmp_path: Path
) -> None:
    first = run_chain(study_of(folder), tmp_path / "store")
    both = ["grad_cam", {"name": "integrated_gradients", "steps": 2}]
    second = run_chain(study_of(folder, name="second", methods=both), tmp_path / "store")
    assert second.counts == {"attribute": 2, "metrics": 2, "report": 1}
    shared = {key: value for key, value in by_path(first).items() if key[1] == "grad_cam"}
    assert {key: value for key, value in by_path(second).items() if key[1] == "grad_cam"} == shared
    assert first.run_id != second.run_id


BROKEN = {
    "even/bad.png": b"this is no picture",
    "odd/empty.jpg": b"",
    "odd/huge.png": png_claiming(20_000, 20_000),
    "even/strip.png": png_claiming(60_000, 1),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_pictures_are_set_aside_and_their_neighbours_do_not_notice(
    run_chain: Chain, ran: Ran, tmp_path: Path
) -> None:
    folder = drawn_folder(tmp_path / "images", 8)
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    mixed = run_chain(study_of(folder), tmp_path / "store")
    rows = mixed.sql("select path, stage, error, message, attempt from quarantine")
    assert {row["path"] for row in rows} == set(BROKEN)
    assert {(row["stage"], row["error"], row["attempt"]) for row in rows} == {("manifest", "SourceError", 1)}
    told = {row["path"]: row["message"] for row in rows}
    assert told["odd/empty.jpg"] == "expected an encoded picture, got 0 bytes"
    assert "expected at most 64000000 pixels" in told["odd/huge.png"]
    assert mixed.quarantined == len(BROKEN)
    assert mixed.sql("select count(*) as n from images") == [{"n": 8}]
    assert_same(by_path(mixed), by_path(ran), atol=1e-5)
    valid = valid_rows(mixed, "attribute", "grad_cam")
    assert sorted(np.flatnonzero(valid)) == [row["image_id"] for row in mixed.sql("from images order by image_id")]


def valid_rows(ran: Ran, stage: str, variant: str) -> np.ndarray:
    """The mask of all shards of a stage's variant, in image order."""
    units = {u: key for u, key in ran.store.runs.read(ran.run_id).units().items() if u.stage == stage}
    records = [ran.store.done(unit, units[unit]) for unit in sorted(units) if unit.variant == variant]
    return np.concatenate([ran.store.read_array(record, "valid") for record in records])


def test_a_shard_of_nothing_but_broken_pictures_is_committed(run_chain: Chain, tmp_path: Path) -> None:
    folder = drawn_folder(tmp_path / "images", 3)
    (folder / "even" / "02.png").write_bytes(b"broken")
    found = run_chain(study_of(folder, run={"shard_size": 1}, concepts={"atoms": 2}), tmp_path / "store")
    assert found.quarantined == 1
    assert len({path for path, _, _ in by_path(found)}) == 2
    assert (
        run_chain(study_of(folder, run={"shard_size": 1}, concepts={"atoms": 2}), tmp_path / "store").counts == {}
    )


def test_more_broken_pictures_than_the_budget_stop_the_run(run_chain: Chain, tmp_path: Path) -> None:
    folder = drawn_folder(tmp_path / "images", 4)
    (folder / "even" / "00.png").write_bytes(b"broken")
    strict = study_of(folder, run={"max_bad_fraction": 0.2})
    with pytest.raises(
        StageError, match=r"1 of 4 images were quarantined, more than run\.max_bad_fraction = 0\.2"
    ):
        run_chain(strict, tmp_path / "store")
    with pytest.raises(StageError, match="1 of 4 images were quarantined"):
        run_chain(strict, tmp_path / "store")
    assert run_chain(study_of(folder, run={"max_bad_fraction": 0.25}), tmp_path / "store").quarantined == 1


def test_masks_cut_pictures_and_a_bad_mask_sets_only_its_picture_aside(run_chain: Chain, tmp_path: Path) -> None:
    folder, masks = drawn_folder(tmp_path / "images", 4), tmp_path / "masks"
    for index in range(4):
        values = np.ones((128, 128), np.uint8)
        values[:, 64:] = 2
        path = masks / ("even", "odd")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    Image.new("L", (7, 7)).save(masks / "odd" / "01.png")
    (masks / "odd" / "03.png").write_bytes(b"no mask")
    study = study_of(folder, parts={"parser": "masks"}, dataset={"masks": str(masks)}, concepts={"layers": []})
    found = run_chain(study, tmp_path / "store")
    assert found.sql("select distinct path, stage from quarantine order by path") == [
        {"path": "odd/01.png", "stage": "parts"},
        {"path": "odd/03.png", "stage": "parts"},
    ]
    assert found.quarantined == 2
    areas = found.sql(
        "select path, list(area order by part_id) as areas from parts join images using (image_id) group by 1"
    )
    assert sorted((row["path"], row["areas"]) for row in areas) == [
        ("even/00.png", [8192, 8192]),
        ("even/02.png", [8192, 8192]),
    ]
    assert {path for path, _, _ in by_path(found)} == {"even/00.png", "even/02.png"}
    scored = found.sql("select distinct path from part_scores join images using (image_id) order by 1")
    assert [row["path"] for row in scored] == ["even/00.png", "even/02.png"]


def test_a_picture_that_changes_after_it_was_listed_is_set_aside(run_chain: Chain, tmp_path: Path) -> None:
    folder = drawn_folder(tmp_path / "images", 4)
    study = Study(StudyConfig.model_validate(study_of(folder)), open_store(tmp_path / "store", create=True))
    planner = Planner(study)
    (work,) = to_run(planner.stage(STAGES["manifest"]))
    execute(work)
    Image.fromarray(render(1, 77).image).save(folder / "even" / "00.png")
    (work,) = to_run(planner.stage(STAGES["predict"]))
    receipt = execute(work)
    assert (receipt.images, receipt.ok, receipt.quarantined) == (4, 3, 1)
    record = study.store.done(Unit("predict"), work.key)
    (row,) = study.store.read_table(record, "quarantine").to_pylist()
    assert row["path"] == "even/00.png"
    assert "changed after it was listed" in row["message"]


def test_a_stage_that_loses_an_image_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "manifest", replace(STAGES["manifest"], run=lambda context: Outcome(4, 3)))
    study = Study(StudyConfig.model_validate(TINY), open_store(tmp_path / "store", create=True))
    work, *_ = to_run(Planner(study).stage(STAGES["manifest"]))
    with pytest.raises(RuntimeError, match=r"expected images in = ok \+ quarantined, got 4 in, 3 ok and 0"):
        execute(work)
    assert list(study.store.commits) == []


def test_a_unit_is_executed_once_however_often_it_is_sent(tmp_path: Path) -> None:
    study = Study(StudyConfig.model_validate(TINY), open_store(tmp_path / "store", create=True))
    work, *_ = to_run(Planner(study).stage(STAGES["manifest"]))
    first, second = execute(work), execute(work)
    assert (first.executed, second.executed) == (True, False)
    assert (second.images, second.ok, second.quarantined) == (first.images, first.ok, first.quarantined)


def test_a_constant_model_leaves_undefined_values_null_and_maps_zero(run_chain: Chain, tmp_path: Path) -> None:
    """A model whose head is all zeros: every map is zero, and no value is NaN."""
    weights = load_file(weights_path("vitrine_demo_vit"))
    weights = {name: tensor * 0 if name.startswith("head.") else tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "w.safetensors")
    model = {"name": "vitrine_demo_vit", "checkpoint": str(tmp_path / "w.safetensors")}
    base = config_with(TINY, dataset={"images": 4}, concepts={"layers": []}, model=model)
    found = run_chain(base, tmp_path / "store")
    assert found.quarantined == 0
    assert valid_rows(found, "attribute", "grad_cam").all()
    values = [row["value"] for row in found.sql("select value from metrics")]
    assert values
    assert not any(value is not None and math.isnan(value) for value in values)
