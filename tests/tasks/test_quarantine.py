"""Quarantine end to end: every image that comes in is ok or set aside, in every stage and along the chain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.store import open_store
from tasks.config import StudyConfig
from tasks.errors import StageError
from tasks.stage import Work
from tasks.study import Study
from tasks.worker import built_classifier, classifier
from tests.conftest import Quiet, Ran, SerialExecutor, config_with
from tests.flows.command import call
from tests.memory import Meal, needs_limits, short_of_memory
from tests.tasks.odd import MARKS, odd_methods, write_picture

pytestmark = [needs_limits, short_of_memory]

METHODS = ["grad_cam", "kl_hessian", "odd_map", "odd_parts"]
STUDY: dict[str, Any] = {
    "name": "odd",
    "model": {"name": "odd_vit", "pretrained": False},
    "parts": {"parser": "masks"},
    "methods": METHODS,
    "metrics": [
        {"name": "insertion", "steps": 3, "baseline": "black"},
        {"name": "deletion", "steps": 3, "baseline": "black"},
        {"name": "p_deletion", "baseline": "black"},
    ],
    "concepts": {"layers": ["blocks.0"], "extractors": ["bisecting_kmeans"], "atoms": 2},
    "run": {"shard_size": 5, "batch_size": 4, "max_bad_fraction": 1.0},
}
GOOD = 6

# What each bad picture's rows in ``quarantine`` are: path, stage, methods, error, and a word of the message.
EXPECTED = {
    ("a/broken.png", "manifest", "", "SourceError", "begins with"),
    ("a/empty.png", "manifest", "", "SourceError", "got 0 bytes"),
    ("a/nan_logits.png", "predict", "", "NotFinite", "logits"),
    # Predicting and cutting do not wait for each other: both meet the picture that changed.
    ("b/changed.png", "predict", "", "SourceError", "changed after it was listed"),
    ("b/changed.png", "parts", "", "SourceError", "changed after it was listed"),
    ("b/bad_mask.png", "parts", "", "SourceError", "expected bad_mask.png of size 64 x 64"),
    ("b/both.png", "predict", "", "NotFinite", "logits"),
    ("b/both.png", "parts", "", "SourceError", "expected both.png of size 64 x 64"),
    ("a/nan_gradient.png", "pfv", "", "NotFinite", "layer blocks.0"),
    ("a/nan_gradient.png", "attribute", "kl_hessian", "NotFinite", "part"),
    ("a/nan_map.png", "attribute", "odd_map", "NotFinite", "map"),
    ("a/too_large.png", "attribute", "odd_map", "OutOfMemory", "even alone"),
    ("a/nan_part.png", "attribute", "odd_parts", "NotFinite", "part"),
    *(
        ("a/nan_when_perturbed.png", "metrics", m, "NotFinite", "deletion[baseline=black,steps=3]")
        for m in METHODS
    ),
}
BAD = {path for path, *_ in EXPECTED}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with odd_methods():
        yield


def write_masks(masks: Path, folder: Path) -> None:
    """Four square parts for every picture."""
    values = np.repeat(np.repeat(np.array([[1, 2], [3, 4]], np.uint8), 32, axis=0), 32, axis=1)
    for path in sorted(folder.rglob("*.png")):
        mask = masks / path.relative_to(folder)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(mask)


def write_pictures(folder: Path, masks: Path) -> None:
    """Six good pictures and one for every way to be bad."""
    for index in range(GOOD):
        write_picture(folder / "ab"[index % 2] / f"{index:02d}.png", index)
    for index, mark in enumerate(MARKS):
        write_picture(folder / "a" / f"{mark}.png", 100 + index, mark)
    for index, name in enumerate(("changed", "bad_mask")):
        write_picture(folder / "b" / f"{name}.png", 200 + index)
    write_picture(folder / "b" / "both.png", 300, "nan_logits")
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    (folder / "a" / "empty.png").touch()
    write_masks(masks, folder)
    for name in ("bad_mask", "both"):
        Image.new("L", (9, 9)).save(masks / "b" / f"{name}.png")


class Rewriting(SerialExecutor):
    """Runs works in this process; once the images are listed, one of them is replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def run(self, works: list[Work]) -> Iterator[Any]:
        if works and works[0].unit.stage == "predict":
            write_picture(self._path, 999)
        yield from super().run(works)


def conducted(document: dict[str, Any], root: Path, executor: SerialExecutor) -> Ran:
    from flows.study import conduct
    from tasks.sources import open_source

    open_source.cache_clear()
    study = Study(StudyConfig.model_validate(document), open_store(root, create=True))
    result = conduct(study, executor, Quiet(), tasks=False)
    return Ran(study.store, result.run_id, tuple(executor.executed), result.quarantined)


def study_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return config_with({**STUDY, "dataset": {"kind": "folder", "path": str(folder)}}, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def ran(place: Path) -> Ran:
    """The chain over good and bad pictures; one changes on the way."""
    folder, masks = place / "images", place / "masks"
    write_pictures(folder, masks)
    document = study_of(folder, dataset={"masks": str(masks)})
    return conducted(document, place / "store", Rewriting(folder / "b" / "changed.png"))


@pytest.fixture(scope="module")
def clean(place: Path, ran: Ran) -> Ran:
    """The chain over the good pictures alone, one by one like their bad neighbours' shards never were."""
    folder, masks = place / "clean", place / "clean-masks"
    for index in range(GOOD):
        write_picture(folder / "ab"[index % 2] / f"{index:02d}.png", index)
    write_masks(masks, folder)
    return conducted(study_of(folder, dataset={"masks": str(masks)}), place / "clean-store", SerialExecutor())


# Which stages an image must have passed before each: a picture set aside there is not given to it.
BEFORE = """
(values ('predict', 'manifest', false), ('parts', 'manifest', false), ('pfv', 'manifest', false),
        ('pfv', 'predict', false), ('attribute', 'manifest', false), ('attribute', 'predict', false),
        ('attribute', 'parts', true), ('metrics', 'manifest', false), ('metrics', 'predict', false),
        ('metrics', 'parts', false), ('metrics', 'attribute', false)) as passed(stage, earlier, parts_only)
"""

# listed = given + set aside earlier, and given = ok + set aside here, for every stage and method.
RECONCILIATION = f"""
with listed as (select sum(images) as listed from timings where stage = 'manifest'),
given as (
    select stage, method, sum(images) as given from timings
    where stage not in ('dictionary', 'exemplars', 'report') group by all
),
earlier as (
    select g.stage, g.method, count(distinct q.image_id) as earlier
    from given g join {BEFORE} on passed.stage = g.stage
    join quarantine q on q.stage = passed.earlier and q.method in ('', g.method)
    where not parts_only or g.method in (select method from method_info where output = 'parts')
    group by all
),
here as (
    select stage, method, count(*) as here, count(distinct image_id) as images from quarantine group by all
)
select g.stage, g.method, listed, given, coalesce(earlier, 0) as earlier, coalesce(here, 0) as here,
       coalesce(images, 0) as images
from given g cross join listed
left join earlier e on e.stage = g.stage and e.method = g.method
left join here h on h.stage = g.stage and h.method = g.method
order by all
"""

# Images with results, by stage and method, where results are rows.
ROWS = """
select 'manifest' as stage, '' as method, count(*) as ok from images
union all select 'predict', '', count(*) from images where target is not null
union all select 'parts', '', count(distinct image_id) from parts
union all select 'attribute', method, count(distinct image_id) from part_scores group by 2
union all select 'metrics', method, count(distinct image_id) from metrics group by 2
"""


def ok_by_arrays(ran: Ran) -> dict[tuple[str, str], int]:
    """Images that ``valid`` says have a result, by stage and method."""
    found: dict[tuple[str, str], int] = {}
    for _, record in ran.store.records([ran.run_id]):
        if "valid" in record.facts["arrays"]:
            place = (record.unit.stage, record.unit.variant)
            found[place] = found.get(place, 0) + int(ran.store.read_array(record, "valid").sum())
    return found


def reconcile(ran: Ran) -> list[dict[str, Any]]:
    """The books of a run, checked from every side; gives them back."""
    books = ran.sql(RECONCILIATION)
    rows = {(row["stage"], row["method"]): row["ok"] for row in ran.sql(ROWS)}
    arrays = ok_by_arrays(ran)
    for row in books:
        place = (row["stage"], row["method"])
        assert row["listed"] == row["given"] + row["earlier"], row
        assert row["here"] == row["images"], row
        for found in (rows, arrays):
            assert found.get(place, 0) == row["given"] - row["here"] or place not in found, (place, row)
    for _, record in ran.store.records([ran.run_id]):
        facts = record.facts
        assert facts["images"] == facts["ok"] + facts["quarantined"]
        assert facts["quarantined"] == ran.store.read_table(record, "quarantine").num_rows
    assert set(arrays) | set(rows) >= {
        (row["stage"], row["method"]) for row in books if row["given"] > row["here"]
    }
    return books


def test_every_image_is_accounted_for_in_every_stage_and_method(ran: Ran) -> None:
    books = reconcile(ran)
    assert [(row["stage"], row["method"]) for row in books] == [
        *(("attribute", method) for method in METHODS),
        ("manifest", ""),
        *(("metrics", method) for method in METHODS),
        ("parts", ""),
        ("pfv", ""),
        ("predict", ""),
    ]
    assert {row["listed"] for row in books} == {GOOD + len(BAD)}
    assert ran.quarantined == len(BAD)


def test_each_bad_picture_is_set_aside_where_it_is_bad_and_nowhere_else(ran: Ran) -> None:
    rows = ran.sql("select path, stage, method, error, message from quarantine")
    found = {(row["path"], row["stage"], row["method"]): (row["error"], row["message"]) for row in rows}
    assert len(rows) == len(found)
    assert found.keys() == {expected[:3] for expected in EXPECTED}
    for *place, error, word in EXPECTED:
        assert found[tuple(place)][0] == error, place
        assert word in found[tuple(place)][1], place


def test_the_other_methods_keep_what_one_method_could_not_explain(ran: Ran) -> None:
    rows = ran.sql(
        "select path, list(distinct method order by method) as methods from metrics join images using (image_id) "
        "group by path"
    )
    found = {row["path"]: row["methods"] for row in rows}
    for path, without in [
        ("a/nan_gradient.png", "kl_hessian"),
        ("a/nan_map.png", "odd_map"),
        ("a/too_large.png", "odd_map"),
        ("a/nan_part.png", "odd_parts"),
    ]:
        assert found[path] == [method for method in METHODS if method != without], path
    assert "a/nan_when_perturbed.png" not in found
    assert "b/bad_mask.png" not in found
    (masked,) = ran.sql("select image_id from images where path = 'b/bad_mask.png'")
    for method, has_map in [("grad_cam", True), ("odd_map", True), ("kl_hessian", False), ("odd_parts", False)]:
        maps = ran.store.xarray(f"attribute/{method}/maps", ran.run_id)
        assert bool(maps.sel(image=masked["image_id"])["valid"]) is has_map, method


def test_nothing_that_is_not_a_number_is_stored(ran: Ran) -> None:
    for table, column in [
        ("predictions", "logit"),
        ("predictions", "prob"),
        ("curves", "prob"),
        ("part_scores", "score"),
    ]:
        (found,) = ran.sql(
            f"select count(*) as n, count(*) filter (not isfinite({column}) or {column} is null) as bad "
            f"from {table}"
        )
        assert found["n"] > 0 and found["bad"] == 0, table
    (terms,) = ran.sql(
        "select count(kl_sym) as n, count(*) as rows from part_scores "
        "where method = 'kl_hessian' and isfinite(kl_sym) and isfinite(curvature)"
    )
    assert terms["n"] == terms["rows"] > 0
    for _, record in ran.store.records([ran.run_id]):
        for name in record.facts["arrays"]:
            assert np.isfinite(ran.store.read_array(record, name)).all(), (record.unit, name)


def test_a_value_is_null_only_where_the_map_is_constant(ran: Ran) -> None:
    for method in METHODS:
        maps = ran.store.xarray(f"attribute/{method}/maps", ran.run_id)
        flat = maps.values.reshape(len(maps), -1)
        constant = set(maps["image"].values[flat.min(axis=1) == flat.max(axis=1)].tolist())
        rows = ran.sql(f"select image_id, metric, value from metrics where method = '{method}'")
        assert rows and all(row["value"] is None or np.isfinite(row["value"]) for row in rows)
        assert {row["image_id"] for row in rows if row["value"] is None} <= constant


def test_the_good_ones_do_not_notice(ran: Ran, clean: Ran) -> None:
    assert clean.quarantined == 0
    reconcile(clean)
    text = "select path, method, metric, value from metrics join images using (run_id, image_id)"
    expected = {(row["path"], row["method"], row["metric"]): row["value"] for row in clean.sql(text)}
    found = {(row["path"], row["method"], row["metric"]): row["value"] for row in ran.sql(text)}
    assert len(expected) == GOOD * len(METHODS) * 3
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, abs=1e-6), place


def test_the_second_run_does_nothing_and_counts_the_same(ran: Ran, place: Path) -> None:
    document = study_of(place / "images", dataset={"masks": str(place / "masks")})
    # The file that changed has a new time: only its shard is listed again, and what it feeds.
    again = conducted(document, place / "store", SerialExecutor())
    third = conducted(document, place / "store", SerialExecutor())
    assert third.executed == ()
    assert third.quarantined == again.quarantined == len(BAD - {"b/changed.png"})
    reconcile(third)


def test_the_budget_counts_images_not_rows(place: Path, ran: Ran) -> None:
    """In attribute four images are bad, by one method each; one is bad in metrics, by all four methods."""
    document = study_of(place / "images", dataset={"masks": str(place / "masks")}, name="strict")
    share = 4 / (GOOD + len(BAD))
    assert conducted(
        {**document, "run": {**STUDY["run"], "max_bad_fraction": share}}, place / "strict", SerialExecutor()
    )
    tight = {**document, "run": {**STUDY["run"], "max_bad_fraction": share * 0.99}}
    with pytest.raises(StageError, match=r"stage \w+: 4 of \d+ images were quarantined, .+ `vitrine quarantine`"):
        conducted(tight, place / "tight", SerialExecutor())


def test_features_that_are_not_finite_set_one_picture_aside_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index in range(3):
        write_picture(folder / "a" / f"{index}.png", index)
    write_picture(folder / "a" / "nan.png", 9, "nan_logits")
    document = study_of(folder, parts={"parser": "tokens", "k": 3}, methods=["grad_cam"])
    found = conducted(document, tmp_path / "store", SerialExecutor())
    rows = found.sql("select path, stage, error, message from quarantine order by stage")
    assert [(row["path"], row["stage"], row["error"]) for row in rows] == [
        ("a/nan.png", "parts", "NotFinite"),
        ("a/nan.png", "predict", "NotFinite"),
    ]
    assert "odd_vit gave features that are NaN or infinite" in rows[0]["message"]
    assert found.sql("select count(distinct image_id) as n from parts") == [{"n": 3}]
    reconcile(found)


def test_a_chain_short_of_memory_gives_what_one_with_enough_does(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index in range(5):
        write_picture(folder / "a" / f"{index}.png", index)
    shape: dict[str, Any] = {"parts": {"parser": "tokens", "k": 3}, "run": {"shard_size": 5, "batch_size": 8}}
    plenty = conducted(study_of(folder, **shape), tmp_path / "plenty", SerialExecutor())
    model = {"create_args": {"fits": 2}}
    document = study_of(folder, model=model, **shape)
    built_classifier.cache_clear()
    short = conducted(document, tmp_path / "short", SerialExecutor())
    meal = classifier(StudyConfig.model_validate(document).model.model_dump_json(), "cpu").module.meal
    # All five images in predict, parts, pfv and by grad_cam; eight pictures in flat passes.
    assert meal.refused.count(5) >= 4 and meal.refused.count(8) >= 2
    assert max(set(meal.asked) - set(meal.refused)) == 2
    assert short.quarantined == plenty.quarantined == 0
    for table, order in [
        ("predictions", "image_id, rank"),
        ("parts", "image_id, part_id"),
        ("part_scores", "image_id, method, part_id"),
        ("metrics", "image_id, method, metric"),
        ("curves", "image_id, method, curve, step"),
    ]:
        text = f"select * exclude (run_id) from {table} order by {order}"
        expected, found = plenty.sql(text), short.sql(text)
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            for name, value in one.items():
                near = isinstance(value, float)
                assert other[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if near else value), (one, other)


def test_a_model_that_fits_no_image_sets_all_aside_and_the_run_still_ends(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index in range(3):
        write_picture(folder / "a" / f"{index}.png", index)
    document = study_of(folder, parts={"parser": "grid", "k": 4}, methods=["grad_cam"])
    study = Study(StudyConfig.model_validate(document), open_store(tmp_path / "store", create=True))
    assert study.model  # Built and measured while there was room.
    module = classifier(study.config.model.model_dump_json(), "cpu").module
    module.meal = Meal(fits=0)
    try:
        found = conducted(document, tmp_path / "store", SerialExecutor())
    finally:
        module.meal = None
    rows = found.sql("select distinct stage, error from quarantine")
    assert rows == [{"stage": "predict", "error": "OutOfMemory"}]
    assert module.meal is None
    assert found.quarantined == 3
    reconcile(found)


@pytest.mark.parametrize("kind", ["unreadable", "nan_logits", "one_left"])
def test_a_study_of_bad_pictures_alone_ends_with_a_report(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index in range(4):
        path = folder / "a" / f"{index}.png"
        write_picture(path, index, *(("nan_logits",) if kind != "unreadable" else ()))
        if kind == "unreadable":
            path.write_bytes(b"nothing")
    if kind == "one_left":
        write_picture(folder / "a" / "good.png", 50)
    document = study_of(folder, parts={"parser": "grid", "k": 4}, run={"shard_size": 2})
    document["concepts"] = {**document["concepts"], "class_token": False}
    found = conducted(document, tmp_path / "store", SerialExecutor())
    assert found.quarantined == 4
    reconcile(found)
    good = 1 if kind == "one_left" else 0
    assert found.sql("select count(*) as n from concepts") == [{"n": 0}]
    assert found.sql("select count(distinct image_id) as n from metrics") == [{"n": good}]
    records = {str(record.unit): record for _, record in found.store.records([found.run_id])}
    assert records["dictionary blocks.0 / bisecting_kmeans #0"].facts["vectors"] == good
    page = found.store.read_file(records["report #0"], "report").read_text()
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "a/0.png" in text
    assert "Fewer than two vectors were sampled" in text
    assert ("no image got a prediction" in text) is (good == 0)
    assert {"unreadable": "SourceError"}.get(kind, "NotFinite") in text
    assert conducted(document, tmp_path / "store", SerialExecutor()).executed == ()


def test_the_command_lists_what_was_set_aside(ran: Ran, place: Path, tmp_path: Path) -> None:
    store = place / "store"
    shown = call("quarantine", "--store", store, "--run", ran.run_id, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split() == ["image_id", "path", "stage", "methods", "error", "message"]
    written = call("quarantine", "--store", store, "--format", "json", cwd=tmp_path)
    rows = json.loads(written.stdout)
    assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
    perturbed = [row for row in rows if row["path"] == "a/nan_when_perturbed.png"]
    assert [row["methods"] for row in perturbed] == [", ".join(METHODS)]
    images = len({row["image_id"] for row in rows})
    for told in (shown.stdout.splitlines()[-1], written.stderr):
        assert f"{images} images quarantined in run {ran.run_id}: " in told
        assert "manifest SourceError 2" in told and "attribute OutOfMemory 1" in told


def test_the_command_writes_every_format(ran: Ran, place: Path, tmp_path: Path) -> None:
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    for name, read in [("x.csv", pacsv.read_csv), ("x.parquet", pq.read_table)]:
        done = call("quarantine", "--store", place / "store", "-o", name, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout == "" and "images quarantined" in done.stderr
        table = read(tmp_path / name)
        assert table.column_names == ["image_id", "path", "stage", "methods", "error", "message"]
        assert table.num_rows == len(ran.sql("select distinct image_id, stage, error, message from quarantine"))


def test_the_command_says_so_where_nothing_is_quarantined(clean: Ran, place: Path, tmp_path: Path) -> None:
    shown = call("quarantine", "--store", place / "clean-store", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, f"nothing is quarantined in run {clean.run_id}\n")
    as_json = call("quarantine", "--store", place / "clean-store", "--format", "json", cwd=tmp_path)
    assert json.loads(as_json.stdout) == [] and "nothing is quarantined" in as_json.stderr


def test_the_command_refuses_what_it_does_not_know(clean: Ran, place: Path, tmp_path: Path) -> None:
    unknown = call("quarantine", "--store", place / "clean-store", "--run", "od", cwd=tmp_path)
    assert unknown.returncode == 2
    assert f"--run: expected a run of {place / 'clean-store'}, got 'od'" in unknown.stderr
    open_store(tmp_path / "empty", create=True)
    empty = call("quarantine", "--store", tmp_path / "empty", cwd=tmp_path)
    assert empty.returncode == 2 and "expected a store with a run" in empty.stderr
