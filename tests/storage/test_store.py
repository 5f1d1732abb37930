"""Tables and the store: what readers see rests on commit records alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.version import Version

from storage.arrays import ArraySpec
from storage.canonical import digest_file
from storage.commits import CommitRecord, Unit, key_of
from storage.errors import NoStoreError, StoreError
from storage.files import TEMPORARY
from storage.schema import FORMAT_VERSION, READ_SINCE, TABLES, rows_to_table
from storage.store import Store, open_store

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
    return rows_to_table("metrics", {**columns, "reason": [None] * count})


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
    assert [Path(one.path).suffix for one in record.objects] == [".parquet", ".0", ".json", ".txt"]
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


def test_a_dataset_without_files_has_the_tables_columns(store: Store) -> None:
    assert store.dataset("metrics", []).schema.names == TABLES["metrics"].names


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
        rows_to_table(
            "metrics", {"image_id": ["one"], "method": ["m"], "metric": ["x"], "value": [0.5], "reason": [None]}
        )


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("position", range(4), ids=["table", "array", "metadata", "file"])
@pytest.mark.parametrize("damage", [damage_missing, damage_truncated])
def test_a_unit_whose_object_is_gone_or_cut_is_not_done(store: Store, position: int, damage) -> None:
    record = commit(store, 0)
    other = commit(store, 1, salt="in an array of its own")
    damage(store.root / record.objects[position].path)
    assert store.done(record.unit, record.key) is None
    assert record.objects[position].path in store.damage(record)[0]
    assert store.done(other.unit, other.key) == other


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


def test_a_damaged_unit_that_is_begun_again_is_not_done_until_it_is_finished(store: Store) -> None:
    record = commit(store, 0)
    (store.root / record.objects[0].path).unlink()
    store.begin(record.unit, record.key, record.ingredients)
    assert store.commits.read(record.unit, record.key) is None


def test_a_commit_that_replaces_rows_of_another_drops_that_one_first(store: Store) -> None:
    old, neighbour = commit(store, 0), commit(store, 1)
    ingredients = {"other": "images under the same listing"}
    writing = store.begin(old.unit, key_of(ingredients), ingredients)
    writing.array("maps", "series", 0, np.full((4, 3), 9, np.float32), SPEC)
    assert list(store.commits) == [neighbour]
    new = writing.finish({"images": 4, "ok": 4, "quarantined": 0})
    assert (store.read_array(new, "maps") == 9).all()
    assert (store.read_array(neighbour, "maps") == 2).all()


def test_a_flipped_bit_of_a_table_or_of_metadata_is_an_error_and_never_a_value(store: Store) -> None:
    record = commit(store, 0)
    metadata = store.root / record.facts["arrays"]["maps"]["path"] / "zarr.json"
    table = store.root / record.facts["tables"]["metrics"]
    for path, read, name in ((table, store.read_table, "metrics"), (metadata, store.read_array, "maps")):
        whole = path.read_bytes()
        for position in range(0, len(whole), 5):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
            with pytest.raises(StoreError, match=r"expected the bytes that metrics grad_cam #0 committed"):
                read(record, name)
        path.write_bytes(whole)
        read(record, name)


def test_a_flipped_bit_of_a_tables_data_is_an_error_for_datasets_too(store: Store) -> None:
    record = commit(store, 0)
    path = store.root / record.facts["tables"]["metrics"]
    # The dictionary page ends with the bytes of the last value: flipped, they are another number and no error.
    last = pq.read_metadata(path).row_group(0).column(3).data_page_offset - 3
    whole = path.read_bytes()
    path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    unchecked = pq.read_table(path, page_checksum_verification=False)["value"]
    assert unchecked.to_pylist() != pq.read_table(pa.BufferReader(whole))["value"].to_pylist()
    with pytest.raises((OSError, pa.ArrowException)):
        store.dataset("metrics", [record]).to_table()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "x"}', b"{}"])
def test_a_damaged_marker_is_named_with_its_remedy(store: Store, content: bytes) -> None:
    (store.root / "vitrine.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"vitrine\.json: expected the store's format, got a damaged file; write"):
        open_store(store.root)


def test_a_store_of_a_newer_format_is_refused_with_the_version_that_it_needs(store: Store) -> None:
    (store.root / "vitrine.json").write_text(json.dumps({"format": 99, "needs": "7.1.0"}))
    for create in (False, True):
        with pytest.raises(StoreError, match=r"has format 99, which needs vitrine 7\.1\.0 or later; this"):
            open_store(store.root, create=create)


def test_a_store_says_which_version_reads_it(store: Store) -> None:
    marker = json.loads((store.root / "vitrine.json").read_bytes())
    assert marker == {"format": FORMAT_VERSION, "needs": READ_SINCE[FORMAT_VERSION]}
    assert Version(READ_SINCE[FORMAT_VERSION]) <= Version(version("vitrine"))
