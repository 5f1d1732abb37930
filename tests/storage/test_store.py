"""Tables and the store: what readers see rests on commit records alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.arrays import ArraySpec
from storage.canonical import digest_file
from storage.commits import CommitRecord, Unit, key_of
from storage.errors import NoStoreError, StoreError
from storage.files import TEMPORARY
from storage.schema import TABLES, rows_to_table
from storage.store import Store, open_store
from storage.verify import Damage, verify_store

SPEC = ArraySpec(8, 4, (3,), "float32", ("image", "x"), {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def commit(store: Store, shard: int, salt: str = "") -> CommitRecord:
    """A unit with one table, one array shard and one file."""
    unit = Unit("metrics", "grad_cam", shard)
    ingredients = {"salt": salt, "shard": shard}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    ids = range(shard * 4, shard * 4 + 4)
    writing.table("metrics", metric_rows(ids))
    writing.array("maps", "series" + salt, shard * 4, np.full((4, 3), shard + 1, np.float32), SPEC)
    writing.file("note", ".txt", f"shard {shard}".encode())
    return writing.finish({"images": 4, "ok": 4, "quarantined": 0})


def metric_rows(ids: range) -> pa.Table:
    count = len(ids)
    columns = {"image_id": list(ids), "method": ["m"] * count, "metric": ["x"] * count, "value": [0.5] * count}
    return rows_to_table("metrics", columns)


def table_ids(store: Store, *records: CommitRecord) -> list[int]:
    return sorted(store.dataset("metrics", records).to_table()["image_id"].to_pylist())


def test_what_a_commit_wrote_comes_back(store: Store) -> None:
    record = commit(store, 1)
    assert store.done(record.unit, record.key) == record
    assert store.read_table(record, "metrics")["image_id"].to_pylist() == [4, 5, 6, 7]
    assert (store.read_array(record, "maps") == 2).all()
    assert store.read_file(record, "note").read_bytes() == b"shard 1"
    assert store.read_table(record, "curves").num_rows == 0


def test_a_record_holds_size_and_digest_of_every_object(store: Store) -> None:
    record = commit(store, 0)
    assert len(record.objects) == 3
    for one in record.objects:
        path = store.root / one.path
        assert (one.bytes, one.sha256) == (path.stat().st_size, digest_file(path))


def test_nothing_is_done_before_finish(store: Store) -> None:
    unit = Unit("metrics", "grad_cam", 0)
    writing = store.begin(unit, key_of({"a": 1}), {"a": 1})
    writing.table("metrics", metric_rows(range(4)))
    assert store.done(unit, key_of({"a": 1})) is None
    assert list(store.commits) == []


def test_a_dataset_holds_committed_files_only(store: Store) -> None:
    first, second = commit(store, 0), commit(store, 1)
    folder = store.root / "tables" / "metrics"
    pq.write_table(metric_rows(range(100, 104)), folder / "stray.parquet")
    whole = (store.root / first.facts["tables"]["metrics"]).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[:-9])
    (folder / f"{TEMPORARY}0-x.parquet").write_bytes(whole)
    assert table_ids(store, first, second) == list(range(8))
    assert table_ids(store, second) == [4, 5, 6, 7]


def test_a_dataset_names_each_rows_commit(store: Store) -> None:
    first, second = commit(store, 0), commit(store, 1)
    rows = store.dataset("metrics", [first, second]).to_table().to_pylist()
    assert {row["commit"] for row in rows if row["image_id"] < 4} == {first.key}
    assert {row["commit"] for row in rows if row["image_id"] >= 4} == {second.key}


def test_a_dataset_without_files_has_the_tables_columns(store: Store) -> None:
    assert store.dataset("metrics", []).schema.names == [*TABLES["metrics"].names, "commit"]


def test_tables_of_another_schema_are_refused(store: Store) -> None:
    writing = store.begin(Unit("metrics"), "0" * 64, {})
    wrong = metric_rows(range(2)).drop_columns(["value"])
    with pytest.raises(StoreError, match="table metrics: expected"):
        writing.table("metrics", wrong)
    retyped = metric_rows(range(2)).set_column(3, "value", pa.array([1, 2]))
    with pytest.raises(StoreError, match="table metrics: expected"):
        writing.table("metrics", retyped)


def test_columns_that_a_schema_lacks_or_types_that_do_not_fit_are_errors() -> None:
    with pytest.raises((KeyError, ValueError)):
        rows_to_table("metrics", {"image_id": [1], "method": ["m"], "metric": ["x"]})
    with pytest.raises(pa.ArrowInvalid):
        rows_to_table("metrics", {"image_id": ["one"], "method": ["m"], "metric": ["x"], "value": [0.5]})


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_altered(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])


DAMAGES = {"missing": damage_missing, "truncated": damage_truncated, "altered": damage_altered}


@pytest.mark.parametrize("position", range(3), ids=["table", "array", "file"])
@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_a_unit_whose_object_is_gone_or_cut_is_not_done(store: Store, position: int, kind: str) -> None:
    record, other = commit(store, 0), commit(store, 1)
    DAMAGES[kind](store.root / record.objects[position].path)
    assert store.done(record.unit, record.key) is None
    assert record.objects[position].path in store.damage(record)[0]
    assert store.done(other.unit, other.key) == other


@pytest.mark.parametrize("position", range(3), ids=["table", "array", "file"])
@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_verify_finds_damage_and_repair_drops_just_that_commit(store: Store, position: int, kind: str) -> None:
    record, other = commit(store, 0), commit(store, 1)
    assert verify_store(store) == (6, [])
    place = record.objects[position].path
    DAMAGES[kind](store.root / place)
    assert verify_store(store) == (6, [Damage(record.unit, place, kind)])
    assert len(list(store.commits)) == 2
    verify_store(store, repair=True)
    assert list(store.commits) == [other]
    assert verify_store(store) == (3, [])


def test_repair_removes_what_killed_writers_left(store: Store) -> None:
    record = commit(store, 0)
    left = store.root / "tables" / "metrics" / f"{TEMPORARY}aa-x.parquet"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 3600,) * 2)
    verify_store(store)
    assert left.exists()
    verify_store(store, repair=True)
    assert not left.exists()
    assert list(store.commits) == [record]


def test_a_unit_committed_again_under_its_key_is_whole(store: Store) -> None:
    record = commit(store, 0)
    (store.root / record.objects[0].path).unlink()
    assert commit(store, 0) == record
    assert store.done(record.unit, record.key) == record


def test_a_store_is_created_only_where_nothing_else_is(tmp_path: Path) -> None:
    with pytest.raises(NoStoreError, match="expected a store in"):
        open_store(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(NoStoreError, match="which holds other things"):
        open_store(tmp_path / "taken", create=True)
    with pytest.raises(NoStoreError, match="which holds other things"):
        open_store(tmp_path / "taken" / "thesis.txt", create=True)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_store_of_a_newer_format_is_refused(store: Store) -> None:
    (store.root / "vitrine.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreError, match="has format 99, this version reads up to 1: upgrade"):
        open_store(store.root)
