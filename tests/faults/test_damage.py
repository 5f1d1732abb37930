"""Damaged outputs of a real study: every one is named, and a repaired store becomes what a clean run gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.commits import CommitRecord
from storage.digest import results_digest
from storage.layout import Kind, kind_of, walk
from storage.store import Store, open_store
from storage.verify import DamageKind, verify_store
from tests.conftest import TINY, Ran
from tests.faults.processes import FULL

PAGE = 4096


def cut(content: bytes) -> bytes:
    """Two thirds of the file: what a copy that was broken off leaves."""
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    """One bit of the middle byte is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


def zero(content: bytes) -> bytes:
    """A page of zeros, as a lost block leaves it; the last byte of a small file stays."""
    length = min(PAGE, len(content) - 1)
    return bytes(length) + content[length:]


@dataclass(frozen=True)
class Fault:
    """A way in which a file goes bad, and as what it is named."""

    name: str
    damage: Callable[[bytes], bytes] | None
    kind: DamageKind

    def inflict(self, path: Path) -> None:
        """Damages the file."""
        if self.damage is None:
            path.unlink()
        else:
            path.write_bytes(self.damage(path.read_bytes()))


FAULTS = (
    Fault("truncated", cut, DamageKind.truncated),
    Fault("a flipped bit", flip, DamageKind.flipped),
    Fault("deleted", None, DamageKind.missing),
    Fault("a zeroed page", zero, DamageKind.flipped),
)
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda one: one.name)

# What is made again without a word when it is not there; the record of a run is the only trace of that run.
MISSED_BY_NOBODY = (Kind.listing, Kind.model, Kind.run)


@pytest.fixture(scope="module")
def base(run_chain: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The tiny study, done once."""
    return run_chain(TINY, tmp_path_factory.mktemp("clean") / "store")


@pytest.fixture
def store(base: Ran, tmp_path: Path) -> Store:
    """A copy of the finished store."""
    return open_store(shutil.copytree(base.store.root, tmp_path / "store"))


def vouched_for(store: Store) -> list[str]:
    """Every file of the store whose damage must be named."""
    unnamed = (Kind.marker, Kind.lock, Kind.server)
    return [path for path in walk(store.root) if kind_of(path) not in unnamed]


def by_sort(store: Store) -> dict[str, str]:
    """One file of every sort: each stage's tables, arrays, metadata, files and records, and the rest by kind."""
    chosen: dict[str, str] = {}
    for path in vouched_for(store):
        kind, parts = kind_of(path), path.split("/")
        stage = parts[-1].split("-")[0] if parts[0] == "tables" else parts[1]
        sort = f"{kind} {parts[0]} {stage}" if kind in (Kind.data, Kind.record, Kind.metadata) else f"{kind}"
        # The last of a sort: not all damage in the first shard.
        chosen[sort] = path
    return chosen


def named(store: Store) -> set[tuple[str, DamageKind]]:
    return {(one.path, one.kind) for one in verify_store(store).damage}


@each_fault
def test_every_single_damaged_file_is_named_and_no_other(store: Store, fault: Fault) -> None:
    paths = vouched_for(store) if FULL else list(by_sort(store).values())
    assert len(paths) > 20
    for path in paths:
        if fault.damage is None and kind_of(path) in MISSED_BY_NOBODY:
            continue
        whole = (store.root / path).read_bytes()
        fault.inflict(store.root / path)
        assert named(store) == {(path, fault.kind)}, path
        (store.root / path).write_bytes(whole)
    assert named(store) == set()


@each_fault
def test_one_file_of_every_sort_damaged_at_once_is_named_repaired_and_redone(
    run_chain: Callable[..., Ran], base: Ran, store: Store, fault: Fault
) -> None:
    expected = results_digest(base.store, base.run_id)
    damaged = [path for path in by_sort(store).values() if kind_of(path) not in (Kind.run, Kind.record)]
    data = {path for path in damaged if kind_of(path) is Kind.data}
    hit = [record for record in store.commits if data & {one.path for one in record.objects}]
    # A damaged record says nothing of its objects: it has to be another unit's.
    others = list({record.unit.stage: record for record in store.commits if record not in hit}.values())
    damaged += [relative(store, record) for record in others]
    units = {record.unit for record in (*hit, *others)}
    for path in damaged:
        fault.inflict(store.root / path)
    surely = {path for path in damaged if fault.damage or kind_of(path) not in MISSED_BY_NOBODY}
    assert {path for path, _ in named(store)} == surely
    with store.maintenance():
        verify_store(store, repair=True)
    again = run_chain(TINY, store.root)
    # Just what was damaged; the metadata of arrays was written anew without computing anything.
    assert set(again.executed) == units
    assert results_digest(store, again.run_id) == expected, different(store, base.store)
    found = verify_store(store)
    assert (found.damage, found.uncommitted) == ((), ())


def different(store: Store, other: Store) -> list[str]:
    """Paths whose committed bytes differ, for a failure's message."""
    digests = [
        {one.path: one.sha256 for record in each.commits for one in record.objects} for each in (store, other)
    ]
    return sorted(path for path in digests[0] if digests[0][path] != digests[1].get(path))


def relative(store: Store, record: CommitRecord) -> str:
    return store.commits.path(record.unit, record.key).relative_to(store.root).as_posix()


def test_a_lost_run_record_comes_back_with_the_next_run(
    run_chain: Callable[..., Ran], base: Ran, store: Store
) -> None:
    store.runs.path(base.run_id).unlink()
    again = run_chain(TINY, store.root)
    assert again.executed == ()
    assert results_digest(store, again.run_id) == results_digest(base.store, base.run_id)


@each_fault
def test_what_is_bad_at_a_glance_is_redone_without_any_repair(
    run_chain: Callable[..., Ran], base: Ran, store: Store, fault: Fault
) -> None:
    """A run looks at sizes: a flipped bit in an object waits for verify, the rest is noticed at once."""
    path = by_sort(store)["data tables predict"]
    fault.inflict(store.root / path)
    again = run_chain(TINY, store.root)
    at_a_glance = fault.kind is not DamageKind.flipped
    assert [unit.stage for unit in again.executed] == (["predict"] if at_a_glance else [])
    with store.maintenance():
        verify_store(store, repair=True)
    run_chain(TINY, store.root)
    assert results_digest(store, base.run_id) == results_digest(base.store, base.run_id)
