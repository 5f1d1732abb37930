"""Verify names every bad file with its kind; repair drops just what is bad."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.commits import CommitRecord
from storage.files import TEMPORARY
from storage.store import Store, open_store
from storage.verify import Damage, DamageKind, verify_store
from tests.storage.writing import commit, run_of, tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def zero_a_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(content) - 1)) + content[min(4096, len(content) - 1) :])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES: dict[Callable[[Path], None], DamageKind] = {
    Path.unlink: DamageKind.missing,
    cut: DamageKind.truncated,
    cut_to_half: DamageKind.truncated,
    flip_a_bit: DamageKind.flipped,
    zero_a_page: DamageKind.flipped,
    lengthen: DamageKind.flipped,
}
by_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)


def two_units(store: Store) -> tuple[CommitRecord, CommitRecord]:
    records = commit(store, 0), commit(store, 1)
    run_of(store, "r", records)
    return records


def test_a_whole_store_has_no_damage(store: Store) -> None:
    two_units(store)
    found = verify_store(store)
    # The two shards share one array, and so its metadata.
    assert (found.objects, found.damage, found.uncommitted) == (7, (), ())
    sizes = {one.path: one.bytes for record in store.commits for one in record.objects}
    assert found.bytes == sum(sizes.values()) == sum((store.root / path).stat().st_size for path in sizes)


@by_damage
@pytest.mark.parametrize("position", [0, 1, 3], ids=["table", "shard", "file"])
def test_a_damaged_object_is_named_and_repair_drops_just_its_commit(store: Store, position: int, damage) -> None:
    record, other = two_units(store)
    place = record.objects[position].path
    damage(store.root / place)
    expected = Damage(place, DAMAGES[damage], record.unit)
    assert verify_store(store).damage == (expected,)
    assert len(list(store.commits)) == 2
    assert verify_store(store, repair=True).damage == (expected,)
    assert list(store.commits) == [other]
    assert store.runs.read("r").state == "incomplete"
    assert verify_store(store).damage == ()
    assert commit(store, record.unit.shard) == record


@by_damage
def test_damaged_metadata_of_an_array_is_written_anew_and_nothing_is_dropped(store: Store, damage) -> None:
    record, other = two_units(store)
    before = tree(store)
    damage(store.root / record.objects[2].path)
    assert verify_store(store).damage == (Damage(record.objects[2].path, DAMAGES[damage], record.unit),)
    verify_store(store, repair=True)
    assert list(store.commits) == [record, other]
    assert tree(store) == before


@by_damage
def test_a_damaged_group_is_written_anew(store: Store, damage) -> None:
    two_units(store)
    before = tree(store)
    group = next(store.root.glob("arrays/*/*/zarr.json"))
    damage(group)
    assert verify_store(store).damage == (Damage(group.relative_to(store.root).as_posix(), DAMAGES[damage]),)
    verify_store(store, repair=True)
    assert tree(store) == before


@by_damage
def test_a_damaged_record_is_named_and_repair_drops_it(store: Store, damage) -> None:
    record, other = two_units(store)
    path = store.commits.path(record.unit, record.key)
    damage(path)
    found = verify_store(store)
    assert [(one.path, one.kind) for one in found.damage] == [
        (path.relative_to(store.root).as_posix(), DAMAGES[damage])
    ]
    # What it vouched for is nobody's now, but for the metadata, which the other one vouches for too.
    assert set(found.uncommitted) == {one.path for one in record.objects} - {one.path for one in other.objects}
    verify_store(store, repair=True)
    assert list(store.commits) == [other]
    assert store.runs.read("r").state == "incomplete"
    assert verify_store(store).damage == ()
    assert commit(store, 0) == record


def test_every_bit_of_a_record_and_of_a_run_is_guarded(store: Store) -> None:
    record, _ = two_units(store)
    for path in (store.commits.path(record.unit, record.key), store.runs.path("r")):
        whole = path.read_bytes()
        for position in range(0, len(whole), 3):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            damaged = {one.path for one in verify_store(store).damage}
            assert path.relative_to(store.root).as_posix() in damaged, position
        path.write_bytes(whole)


@by_damage
def test_a_damaged_run_record_is_named_and_the_store_still_answers(store: Store, damage) -> None:
    records = two_units(store)
    run_of(store, "other", records[:1])
    damage(store.runs.path("r"))
    expected = () if damage is Path.unlink else ((("runs/r.json"), DAMAGES[damage]),)
    assert tuple((one.path, one.kind) for one in verify_store(store).damage) == expected
    assert [run.run_id for run in store.runs.all()] == ["other"]
    assert len(store.sql("select * from metrics")) == 4
    verify_store(store, repair=True)
    assert verify_store(store).damage == ()


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "tables/metrics/extra.parquet",
        "arrays/metrics/readme.md",
        "commits/metrics/grad_cam/0000000.json",
        "runs/r.json.bak",
        "files/x",
        "elsewhere/vitrine.json",
    ],
)
def test_a_foreign_file_is_named_and_left_alone(store: Store, path: str) -> None:
    two_units(store)
    (store.root / path).parent.mkdir(parents=True, exist_ok=True)
    (store.root / path).write_bytes(b"somebody's")
    assert verify_store(store).damage == (Damage(path, DamageKind.foreign),)
    verify_store(store, repair=True)
    assert (store.root / path).read_bytes() == b"somebody's"


def test_an_object_without_a_record_is_told_apart_from_damage(store: Store) -> None:
    record, other = two_units(store)
    store.runs.delete("r")
    run_of(store, "r", [other])
    store.commits.drop(record.unit, record.key)
    found = verify_store(store)
    assert found.damage == ()
    assert len(found.uncommitted) == 3


def test_repair_removes_what_killed_writers_left(store: Store) -> None:
    two_units(store)
    left = store.root / "tables" / "metrics" / f"{TEMPORARY}00000000-1-aa-x.parquet"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert verify_store(store).damage == ()
    assert left.exists()
    verify_store(store, repair=True)
    assert not left.exists()
