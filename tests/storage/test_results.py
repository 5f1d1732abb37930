"""The Python interface: tables, arrays, images and SQL of one run or of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from storage import open_store
from storage.commits import Unit, key_of
from storage.errors import StoreError
from storage.schema import TABLES
from storage.store import Store
from tests.storage.writing import SPEC, commit, run_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


@pytest.fixture
def two_runs(store: Store) -> SimpleNamespace:
    first, second = commit(store, 0), commit(store, 1)
    run_of(store, "one", [first])
    run_of(store, "two", [first, second])
    return SimpleNamespace(store=store, first=first, second=second)


def test_tables_hold_the_rows_of_every_run_that_has_them(two_runs: SimpleNamespace) -> None:
    rows = two_runs.store.table("metrics")
    assert rows.schema.names == ["run_id", *TABLES["metrics"].names]
    found = {run: [] for run in ("one", "two")}
    for row in rows.to_pylist():
        found[row["run_id"]].append(row["image_id"])
    assert found == {"one": [0, 1, 2, 3], "two": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert two_runs.store.table("metrics", "one").num_rows == 4


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_can_be_read_also_when_it_is_empty(two_runs: SimpleNamespace, name: str) -> None:
    assert two_runs.store.table(name).schema.names == ["run_id", *TABLES[name].names]


def test_views_are_tables_too(two_runs: SimpleNamespace) -> None:
    assert two_runs.store.table("runs")["run_id"].to_pylist() == ["one", "two"]
    assert "target_name" in two_runs.store.table("images").schema.names


def test_unknown_names_are_errors_that_name_what_there_is(two_runs: SimpleNamespace) -> None:
    with pytest.raises(StoreError, match=r"got 'metrix'; there are: .*metrics"):
        two_runs.store.table("metrix")
    with pytest.raises(StoreError, match=r"got 'maps'; there are: metrics/grad_cam/maps"):
        two_runs.store.array("maps")
    with pytest.raises(StoreError, match=r"got 'three'; its runs: .*one"):
        two_runs.store.table("metrics", "three")


def test_an_array_is_the_zarr_array_and_xarray_its_committed_rows(two_runs: SimpleNamespace) -> None:
    array = two_runs.store.array("metrics/grad_cam/maps", "one")
    assert array.shape == (8, 3)
    assert (array[:4] == 1).all()
    committed = two_runs.store.xarray("metrics/grad_cam/maps", "one")
    assert committed.dims == ("image", "x")
    np.testing.assert_array_equal(committed["image"], [0, 1, 2, 3])
    np.testing.assert_array_equal(committed, np.ones((4, 3)))
    np.testing.assert_array_equal(two_runs.store.xarray("metrics/grad_cam/maps", "two")["image"], range(8))


def test_rows_of_several_arrays_are_joined_by_xarray_and_refused_as_one_array(store: Store) -> None:
    whole = commit(store, 0)
    unit, ingredients = Unit("metrics", "grad_cam", 1), {"cut": True}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    spec = replace(SPEC, rows=2, shard_rows=2)
    writing.array("maps", "cut", 0, np.full((2, 3), 7, np.float32), spec, image=4)
    run_of(store, "r", [whole, writing.finish({"images": 2, "ok": 2, "quarantined": 0})])
    joined = store.xarray("metrics/grad_cam/maps")
    np.testing.assert_array_equal(joined["image"], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(joined[:, 0], [1, 1, 1, 1, 7, 7])
    with pytest.raises(StoreError, match=r"its rows lie in 2 .+ use xarray"):
        store.array("metrics/grad_cam/maps")


def test_sql_and_its_limits(two_runs: SimpleNamespace) -> None:
    count = "select count(*) as n from metrics"
    assert two_runs.store.sql(count).to_pylist() == [{"n": 12}]
    assert two_runs.store.sql(count, run="one").to_pylist() == [{"n": 4}]


def test_what_is_not_committed_is_not_there(two_runs: SimpleNamespace) -> None:
    store, second = two_runs.store, two_runs.second
    (store.root / second.objects[0].path).unlink()
    assert store.table("metrics", "two")["image_id"].to_pylist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(store.xarray("metrics/grad_cam/maps", "two")["image"], [0, 1, 2, 3])


def test_a_store_without_runs_says_so(store: Store) -> None:
    with pytest.raises(StoreError, match="expected a store with a run"):
        store.array("x")
    assert store.table("metrics").num_rows == 0
