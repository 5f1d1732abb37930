"""Garbage collection takes what no run refers to, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import StoreError
from storage.gc import collect, find_garbage
from storage.store import Store, open_store
from storage.verify import verify_store
from tests.storage.writing import commit, run_of, tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def collect_all(store: Store) -> None:
    with store.maintenance():
        collect(store, find_garbage(store))


def test_what_runs_refer_to_is_no_garbage(store: Store) -> None:
    run_of(store, "a", [commit(store, 0), commit(store, 1)])
    run_of(store, "b", [commit(store, 0, method="kl_hessian")])
    before = tree(store)
    garbage = find_garbage(store)
    assert (garbage.paths, garbage.bytes) == ((), 0)
    collect_all(store)
    assert tree(store) == before


def test_deleting_one_run_leaves_the_other_whole(store: Store) -> None:
    shared, own_a, own_b = commit(store, 0), commit(store, 1), commit(store, 1, method="kl_hessian")
    run_of(store, "b", [shared, own_b])
    only_b = tree(open_store(store.root))
    run_of(store, "a", [shared, own_a])
    store.runs.delete("a")
    garbage = find_garbage(store)
    assert set(garbage.records) == {store.commits.path(own_a.unit, own_a.key).relative_to(store.root).as_posix()}
    # The metadata of the array stays: the shard that both share stands in the same array.
    gone = {own_a.objects[position].path for position in (0, 1, 3)}
    assert set(garbage.objects) == gone
    assert garbage.bytes == sum((store.root / path).stat().st_size for path in garbage.paths)
    collect_all(store)
    assert tree(store) == {path: content for path, content in only_b.items() if path not in garbage.paths}
    assert verify_store(store).damage == ()
    assert store.sql("select run_id, image_id from metrics where run_id = 'b'").num_rows == 8


def test_the_last_run_takes_everything_but_the_marker(store: Store) -> None:
    run_of(store, "a", [commit(store, 0)])
    store.runs.delete("a")
    collect_all(store)
    assert set(tree(store)) == {"vitrine.json"}
    assert not (store.root / "arrays" / "metrics").exists()


def test_finding_removes_nothing_and_foreign_files_are_never_removed(store: Store) -> None:
    record = commit(store, 0)
    foreign = store.root / "tables" / "metrics" / "mine.parquet"
    foreign.write_bytes(b"precious")
    before = tree(store)
    assert len(find_garbage(store).paths) == len(record.objects) + 2
    assert tree(store) == before
    collect_all(store)
    assert set(tree(store)) == {"vitrine.json", "tables/metrics/mine.parquet"}


def test_a_superseded_key_of_a_run_is_garbage(store: Store) -> None:
    old, new = commit(store, 0), commit(store, 0, series="newer")
    run_of(store, "a", [new])
    collect_all(store)
    assert list(store.commits) == [new]
    assert not (store.root / old.objects[1].path).parent.exists()


def test_listings_go_with_the_runs_that_name_them(store: Store) -> None:
    listings = store.root / "listings"
    listings.mkdir()
    for name in ("a" * 24, "b" * 24):
        for suffix in (".parquet", ".json", ".4.json"):
            (listings / f"{name}{suffix}").write_bytes(b"{}")
    run_of(store, "a", [commit(store, 0)], listing="a" * 24)
    assert sorted(find_garbage(store).listings) == [
        f"listings/{'b' * 24}{suffix}" for suffix in (".4.json", ".json", ".parquet")
    ]


def test_nothing_is_called_garbage_while_a_run_record_is_damaged(store: Store) -> None:
    run_of(store, "a", [commit(store, 0)])
    store.runs.path("a").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"runs/a\.json: expected a whole run record, got a damaged one"):
        find_garbage(store)


def test_a_kill_between_records_and_objects_leaves_no_record_without_its_objects(store: Store) -> None:
    record = commit(store, 0)
    garbage = find_garbage(store)
    first_object = min(garbage.paths.index(one.path) for one in record.objects)
    last_record = max(garbage.paths.index(path) for path in garbage.records)
    assert last_record < first_object
