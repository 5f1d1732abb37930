"""Compacted files give the same rows from fewer files, and are of no account where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import storage.compact
from storage.commits import CommitRecord, Unit, key_of
from storage.compact import LEAST_FILES, compact
from storage.gc import collect, find_garbage
from storage.store import Store, open_store
from storage.verify import Damage, DamageKind, verify_store
from tests.storage.writing import metric_rows, run_of

COUNT = LEAST_FILES + 6


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def commit_rows(store: Store, shard: int, salt: str = "") -> CommitRecord:
    unit, ingredients = Unit("metrics", "m", shard), {"shard": shard, "salt": salt}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    writing.table("metrics", metric_rows(range(shard * 4, shard * 4 + 4)))
    return writing.finish({"images": 4, "ok": 4, "quarantined": 0})


@pytest.fixture
def records(store: Store) -> list[CommitRecord]:
    """So many commits that they are worth a file of their own, in a run."""
    found = [commit_rows(store, shard) for shard in range(COUNT)]
    run_of(store, "r", found)
    return found


def rows(store: Store, records: list[CommitRecord]) -> pa.Table:
    return store.dataset("metrics", records).to_table().sort_by("image_id")


def files(store: Store, records: list[CommitRecord]) -> int:
    dataset = store.dataset("metrics", records)
    return len(list(dataset.get_fragments()))


def test_the_rows_are_the_same_from_one_file(store: Store, records: list[CommitRecord]) -> None:
    before, asked = rows(store, records), store.sql("select * from metrics order by image_id")
    assert files(store, records) == COUNT
    compact(store, records)
    assert files(store, records) == 1
    assert rows(store, records).equals(before)
    assert store.sql("select * from metrics order by image_id").equals(asked)
    assert store.table("metrics").sort_by("image_id").to_pylist() == asked.to_pylist()
    assert verify_store(store).damage == ()


def test_few_files_are_left_as_they_are(store: Store, records: list[CommitRecord]) -> None:
    compact(store, records[: LEAST_FILES - 1])
    assert not (store.root / "compact").exists()


def test_what_is_new_is_read_beside_and_compacted_when_it_is_many(
    store: Store, records: list[CommitRecord]
) -> None:
    compact(store, records)
    new = [commit_rows(store, shard) for shard in range(COUNT, 2 * COUNT)]
    assert files(store, [*records, *new[:3]]) == 4
    assert rows(store, [*records, *new[:3]])["image_id"].to_pylist() == list(range((COUNT + 3) * 4))
    compact(store, [*records, *new])
    assert files(store, [*records, *new]) == 2
    assert rows(store, [*records, *new])["image_id"].to_pylist() == list(range(2 * COUNT * 4))


def test_a_copy_with_rows_of_others_is_not_used(store: Store, records: list[CommitRecord]) -> None:
    compact(store, records)
    some = records[:-1]
    assert files(store, some) == len(some)
    assert rows(store, some)["image_id"].to_pylist() == list(range(len(some) * 4))


def test_a_copy_of_other_bytes_than_the_record_names_is_not_used(
    store: Store, records: list[CommitRecord]
) -> None:
    """A unit that was redone and came out otherwise, as timings do."""
    compact(store, records)
    again = records[0]
    writing = store.begin(again.unit, again.key, again.ingredients)
    writing.table("metrics", metric_rows(range(100_000, 100_004)))
    redone = writing.finish({"images": 4, "ok": 4, "quarantined": 0})
    assert rows(store, [redone, *records[1:]])["image_id"].to_pylist()[-4:] == list(range(100_000, 100_004))


DAMAGES: dict[str, tuple[Callable[[Path], object], DamageKind]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), DamageKind.truncated),
    "flipped": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), DamageKind.flipped),
    "missing": (Path.unlink, DamageKind.missing),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_named_and_removed_and_made_again(
    store: Store, records: list[CommitRecord], name: str
) -> None:
    damage, kind = DAMAGES[name]
    before = rows(store, records)
    compact(store, records)
    copy = next((store.root / "compact").rglob("*.parquet"))
    damage(copy)
    assert verify_store(store).damage == (Damage(copy.relative_to(store.root).as_posix(), kind),)
    verify_store(store, repair=True)
    assert rows(store, records).equals(before)
    assert len(list(store.commits)) == COUNT
    compact(store, records)
    assert files(store, records) == 1
    assert rows(store, records).equals(before)
    assert verify_store(store).damage == ()


def test_a_copy_goes_with_the_first_of_its_commits(store: Store, records: list[CommitRecord]) -> None:
    compact(store, records)
    run_of(store, "r", records[1:])
    collect(store, find_garbage(store))
    assert not (store.root / "compact" / "metrics").exists()
    assert rows(store, records[1:]).num_rows == (COUNT - 1) * 4


def test_memory_holds_one_row_group(
    store: Store, records: list[CommitRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(storage.compact, "ROW_GROUP", 40)
    before = rows(store, records)
    compact(store, records)
    copy = next((store.root / "compact").rglob("*.parquet"))
    assert pq.ParquetFile(copy).num_row_groups == COUNT // 10
    assert rows(store, records).equals(before)


def test_a_real_run_of_many_shards_is_compacted_and_counts_the_same(
    run_chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = 12
    monkeypatch.setattr(storage.compact, "LEAST_FILES", images)
    ran = run_chain(
        {
            "name": "many",
            "dataset": {"kind": "demo", "images": images},
            "parts": {"parser": "grid", "k": 2},
            "methods": ["grad_cam"],
            "metrics": ["p_deletion"],
            "run": {"shard_size": 1, "batch_size": 1},
        },
        tmp_path / "store",
    )
    merged = {one.path.parent.name for one in ran.store.compacted.all()}
    assert merged == {"manifest", "targets", "predictions", "parts", "metrics", "curves", "timings"}
    found = ran.sql("select count(*) as n, count(distinct image_id) as images from metrics")
    assert found == [{"n": images, "images": images}]
    assert len(list(ran.store.dataset("metrics", ran.store.results().records()).get_fragments())) == 1
    assert verify_store(ran.store).damage == ()
