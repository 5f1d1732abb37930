"""Stores of earlier versions stay readable: the fixtures are what those versions wrote, and never written anew."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.digest import results_digest
from storage.schema import FORMAT_VERSION, TABLES
from storage.store import Store, open_store
from storage.verify import verify_store
from storage.views import VIEWS

FIXTURES = Path(__file__).parent / "fixtures"
DIGESTS = {2: "91d376ecd7196d82c53302abb318f52437393bbe81c49789b612b174fcae8a5e"}
ROWS = {
    "manifest": 5,
    "targets": 5,
    "predictions": 25,
    "parts": 20,
    "part_scores": 20,
    "metrics": 20,
    "curves": 80,
    "concepts": 2,
    "timings": 17,
    "quarantine": 1,
}


@pytest.fixture(params=sorted(DIGESTS), ids=lambda one: f"format {one}")
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store as an earlier version, or this one, wrote it."""
    with zipfile.ZipFile(FIXTURES / f"format-{request.param}.zip") as archive:
        archive.extractall(tmp_path / "store")
    return open_store(tmp_path / "store")


def test_there_is_a_fixture_of_this_format() -> None:
    assert FORMAT_VERSION in DIGESTS
    assert (FIXTURES / f"format-{FORMAT_VERSION}.zip").stat().st_size < 300_000


def test_every_table_and_view_is_read(store: Store) -> None:
    assert {name: store.table(name).num_rows for name in ROWS} == ROWS
    counts = {view.name: store.sql(f"select count(*) as n from {view.name}").to_pylist()[0]["n"] for view in VIEWS}
    assert counts["leaderboard"] == 4
    assert min(counts.values()) > 0


def test_every_array_is_read_with_its_values(store: Store) -> None:
    for name in store.results().array_names():
        rows = store.xarray(name)
        assert rows.sizes["image"] == 6
        valid = rows if name.endswith("/valid") else rows["valid"]
        assert int(valid.sum()) == 5
    labels = store.xarray("parts/labels")
    assert set(np.unique(labels[labels["valid"]])) == {0, 1, 2, 3}
    maps = store.xarray("attribute/kl_hessian/maps")
    assert float(abs(maps[maps["valid"]]).max(("y", "x")).min()) == 1


def test_it_is_whole_and_means_what_it_meant(store: Store) -> None:
    found = verify_store(store)
    assert (found.damage, found.uncommitted) == ((), ())
    (run,) = store.runs.all()
    number = json.loads((store.root / "vitrine.json").read_bytes())["format"]
    assert results_digest(store, run.run_id) == DIGESTS[number]


def test_values_are_those_that_were_written(store: Store) -> None:
    (row,) = store.table("quarantine").to_pylist()
    assert (row["path"], row["stage"]) == ("pear/broken.png", "manifest")
    assert {image.label_name for image in store.images()} == {"apple", "pear"}
    assert all(image.target is not None for image in store.images())
    scores = store.sql("select score, kl_sym, curvature from part_scores").to_pylist()
    assert all(None not in row.values() for row in scores)


def test_columns_that_are_added_later_read_as_null(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later version does: its schemas have more columns than the files of an earlier store."""
    later = TABLES["metrics"].append(pa.field("confidence", pa.float64()))
    monkeypatch.setitem(TABLES, "metrics", later)
    assert store.table("metrics")["confidence"].to_pylist() == [None] * 20
    assert store.sql("select count(confidence) as n, count(*) as m from metrics").to_pylist() == [
        {"n": 0, "m": 20}
    ]
    (record, rows), *_ = store.results().select("metrics").tables("metrics")
    assert rows.schema == later
    assert record.unit.stage == "metrics"


def test_writing_into_it_leaves_what_it_held_as_it_was(store: Store, run_chain) -> None:
    (run,) = store.runs.all()
    before = results_digest(store, run.run_id)
    document = {"name": "later", "dataset": {"kind": "demo", "images": 2}, "parts": {"parser": "grid", "k": 2}}
    later = run_chain({**document, "methods": ["grad_cam"], "metrics": ["p_deletion"]}, store.root)
    assert later.counts["metrics"] == 1
    assert results_digest(store, run.run_id) == before
    assert json.loads((store.root / "vitrine.json").read_bytes())["format"] == FORMAT_VERSION
    assert verify_store(store).damage == ()
