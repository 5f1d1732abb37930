"""Checking every committed object against its digest."""

from __future__ import annotations

from dataclasses import dataclass

from storage.canonical import digest_file
from storage.commits import CommitRecord, StoredObject, Unit
from storage.files import remove_leftovers
from storage.store import Store


@dataclass(frozen=True)
class Damage:
    """A committed object that is not what its record says: ``missing``, ``truncated`` or ``altered``."""

    unit: Unit
    path: str
    kind: str


def verify_store(store: Store, *, repair: bool = False) -> tuple[int, list[Damage]]:
    """Hashes every object of every record; returns how many were checked and the damaged ones.

    With ``repair`` the records of damaged objects are dropped, so that the next run redoes just those, and
    what killed writers left unpublished is removed; hold the store's lock for it.
    """
    checked = 0
    damage: list[Damage] = []
    for record in store.commits:
        found = [one for one in (_check(store, record, item) for item in record.objects) if one]
        checked += len(record.objects)
        damage += found
        if found and repair:
            store.commits.path(record.unit, record.key).unlink()
    if repair:
        remove_leftovers(store.root)
    return checked, damage


def _check(store: Store, record: CommitRecord, item: StoredObject) -> Damage | None:
    path = store.root / item.path
    if not path.is_file():
        return Damage(record.unit, item.path, "missing")
    if path.stat().st_size != item.bytes:
        return Damage(record.unit, item.path, "truncated" if path.stat().st_size < item.bytes else "altered")
    return None if digest_file(path) == item.sha256 else Damage(record.unit, item.path, "altered")
