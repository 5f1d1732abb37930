"""Checking every byte that the store vouches for, and saying what else lies in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from storage.arrays import GROUP, METADATA, ArraySpec, metadata_of
from storage.canonical import digest_bytes, digest_file
from storage.commits import CommitRecord, StoredObject, Unit
from storage.files import publish_bytes, remove_leftovers
from storage.layout import Kind, kind_of, walk
from storage.listing import seal_of
from storage.runs import load_run
from storage.sealed import is_cut, read_sealed, unseal
from storage.store import Store

INCOMPLETE = "incomplete"
# Folders of sealed documents beside the records of commits and runs.
DOCUMENTS = ("attempts", "listings", "models")


class DamageKind(StrEnum):
    """What is wrong with a file."""

    missing = "missing"
    truncated = "truncated"
    flipped = "flipped"
    foreign = "foreign"


@dataclass(frozen=True, order=True)
class Damage:
    """A file that is not as it was committed, or that no writer of ours put there; ``unit`` is whose it is."""

    path: str
    kind: DamageKind
    unit: Unit | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}{f' ({self.unit})' if self.unit else ''}"


@dataclass(frozen=True)
class Verification:
    """What was found: objects and bytes hashed, what is damaged, and objects that no record vouches for.

    ``uncommitted`` is what writers left that were killed before their record (or write right now): nobody
    sees it, and ``gc`` removes it.
    """

    objects: int
    bytes: int
    damage: tuple[Damage, ...]
    uncommitted: tuple[str, ...] = field(default=())


def verify_store(store: Store, *, repair: bool = False) -> Verification:
    """Hashes every object of every record, checks the records themselves, and names every file that is bad.

    With ``repair`` (hold :meth:`Store.maintenance` for it) the commits of damaged objects are dropped, array
    metadata is written anew from the records, and leftovers of killed writers are removed. Foreign files are left.
    """
    records = [(path, CommitRecord.from_bytes(content)) for path, content in _contents(store.commits.paths())]
    whole = [record for _, record in records if record is not None]
    owners = _owners(whole)
    damage = [
        *_check_objects(store, owners),
        *_check_records(store, [path for path, record in records if record is None]),
        *_check_groups(store, whole),
        *_check_documents(store),
        *_check_listings(store),
        *_check_compacted(store),
        *_check_presence(store),
    ]
    foreign, uncommitted = _unaccounted(store, owners)
    found = tuple(sorted({*damage, *foreign}))
    if repair:
        found = _repair(store, found, owners)
        remove_leftovers(store.root)
    objects = {one.path: one.bytes for one, _ in owners.values()}
    return Verification(len(objects), sum(objects.values()), found, uncommitted)


def _contents(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """Files that are still there: while a run writes, a record may be dropped at any moment."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path, path.read_bytes()


Owners = dict[str, tuple[StoredObject, list[CommitRecord]]]


def _owners(records: Iterable[CommitRecord]) -> Owners:
    """Every committed object with the records that vouch for it; an array's metadata has many."""
    owners: Owners = {}
    for record in records:
        for one in record.objects:
            owners.setdefault(one.path, (one, []))[1].append(record)
    return owners


def _check_objects(store: Store, owners: Owners) -> list[Damage]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kinds = pool.map(lambda pair: _check_object(store.root, pair[0]), owners.values())
        return [
            Damage(one.path, kind, holders[0].unit)
            for (one, holders), kind in zip(owners.values(), kinds, strict=True)
            if kind is not None
        ]


def _check_object(root: Path, one: StoredObject) -> DamageKind | None:
    try:
        size = (root / one.path).stat().st_size
        if size < one.bytes:
            return DamageKind.truncated
        same = size == one.bytes and digest_file(root / one.path) == one.sha256
    except FileNotFoundError:
        return DamageKind.missing
    return None if same else DamageKind.flipped


def _check_records(store: Store, broken: Sequence[Path]) -> list[Damage]:
    """Commit records that are not whole: what they vouched for is uncommitted."""
    return [_damaged_document(store, path) for path in broken]


def _damaged_document(store: Store, path: Path) -> Damage:
    kind = DamageKind.truncated if is_cut(path.read_bytes()) else DamageKind.flipped
    return Damage(_relative(store, path), kind)


def _check_groups(store: Store, records: Iterable[CommitRecord]) -> Iterator[Damage]:
    """The zarr.json above the arrays of a stage's variant, which is the same for all."""
    places = {place["path"] for record in records for place in record.facts.get("arrays", {}).values()}
    for folder in sorted({path.rsplit("/", 1)[0] for path in places}):
        path = f"{folder}/{METADATA}"
        kind = _check_object(store.root, StoredObject(path, len(GROUP), digest_bytes(GROUP)))
        if kind is not None:
            yield Damage(path, kind)


def _check_documents(store: Store) -> Iterator[Damage]:
    """Run records, and what is known of models, listings and attempts: sealed, like commit records."""
    for path in store.runs.paths():
        if load_run(path) is None:
            yield _damaged_document(store, path)
    for path in sorted(path for name in DOCUMENTS for path in (store.root / name).glob("*.json")):
        if unseal(path.read_bytes()) is None:
            yield _damaged_document(store, path)


def _check_listings(store: Store) -> Iterator[Damage]:
    """Listings are made again from their source where they are damaged."""
    for path in sorted((store.root / "listings").glob("*.parquet")):
        seal = read_sealed(seal_of(path))
        name = _relative(store, path)
        kind = None if seal is None else _check_object(store.root, StoredObject(name, **seal))
        if kind is not None:
            yield Damage(name, kind)


def _check_compacted(store: Store) -> Iterator[Damage]:
    """Compacted files are copies: a damaged one is removed, and made again by the next run."""
    for path in sorted(store.compacted.folder.glob("*/*.json")):
        if unseal(path.read_bytes()) is None:
            yield _damaged_document(store, path)
    for one in store.compacted.all():
        name = _relative(store, one.path)
        kind = _check_object(store.root, StoredObject(name, one.bytes, one.sha256))
        if kind is not None:
            yield Damage(name, kind)


def _check_presence(store: Store) -> Iterator[Damage]:
    """Records that a complete run had and that are gone."""
    for run in store.runs.all():
        if run.state == "complete":
            for unit, key in run.units().items():
                path = store.commits.path(unit, key)
                if not path.exists():
                    yield Damage(_relative(store, path), DamageKind.missing, unit)


def _unaccounted(store: Store, owners: Owners) -> tuple[list[Damage], tuple[str, ...]]:
    """Files that no writer of ours would have put there, and objects without a record."""
    foreign, uncommitted = [], []
    for path in walk(store.root):
        kind = kind_of(path)
        if kind is None:
            foreign.append(Damage(path, DamageKind.foreign))
        elif kind in (Kind.data, Kind.metadata) and path not in owners:
            uncommitted.append(path)
    return foreign, tuple(uncommitted)


def _repair(store: Store, damage: Iterable[Damage], owners: Owners) -> tuple[Damage, ...]:
    """Mends what can be mended; returns the damage with what was foreign still in it."""
    dropped: set[str] = set()
    for one in damage:
        path = store.root / one.path
        if one.kind is DamageKind.foreign:
            continue
        if one.path in owners:
            _, holders = owners[one.path]
            if not _restore_metadata(path, holders[0], owners[one.path][0]):
                dropped |= {record.key for record in holders}
                for record in holders:
                    store.commits.drop(record.unit, record.key)
        elif kind_of(one.path) is Kind.group:
            publish_bytes(path, GROUP)
        else:
            # What is made anew when it is missed (listings, model facts, compacted files), and records that say
            # nothing any more.
            path.unlink(missing_ok=True)
    _note_incomplete(store, dropped)
    return tuple(damage)


def _restore_metadata(path: Path, record: CommitRecord, expected: StoredObject) -> bool:
    """Writes an array's metadata anew from a record that knows what it was; false if it comes out otherwise."""
    if path.name != METADATA:
        return False
    for place in record.facts["arrays"].values():
        if expected.path == f"{place['path']}/{METADATA}" and "spec" in place:
            content = metadata_of(ArraySpec.from_json(place["spec"]))
            if digest_bytes(content) == expected.sha256:
                publish_bytes(path, content)
                return True
    return False


def _note_incomplete(store: Store, dropped: set[str]) -> None:
    """Runs that miss units now are no longer complete."""
    for run in store.runs.all():
        units = run.units()
        gone = any(key in dropped or not store.commits.path(unit, key).exists() for unit, key in units.items())
        if run.state == "complete" and gone:
            store.runs.write(replace(run, state=INCOMPLETE))


def _relative(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()
