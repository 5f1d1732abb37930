"""Garbage collection: what no run refers to any more, found first and removed on a second word."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.commits import CommitRecord
from storage.errors import StoreError
from storage.files import leftovers, remove_durably, remove_leftovers
from storage.layout import Kind, kind_of, walk
from storage.runs import load_run
from storage.store import Store


@dataclass(frozen=True)
class Garbage:
    """What no run refers to: commit records, the objects that only they vouch for, listings and copies.

    Paths are relative to the store. ``leftovers`` are what killed writers left, checkpoints of trainings
    that did not end among it; ``bytes`` is the sum.
    """

    records: tuple[str, ...]
    objects: tuple[str, ...]
    listings: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes: int

    @property
    def paths(self) -> tuple[str, ...]:
        """All of it, in the order in which it is removed: no record ever stands without its objects."""
        return (*self.records, *self.objects, *self.listings, *self.leftovers)


def find_garbage(store: Store) -> Garbage:
    """What no run of the store refers to. Files that no writer of ours put there are not touched.

    Raises:
        StoreError: a damaged run record: what it refers to cannot be known.
    """
    _refuse_damaged_runs(store)
    live = {key for run in store.runs.all() for key in run.units().values()}
    records = [(path, CommitRecord.from_bytes(path.read_bytes())) for path in store.commits.paths()]
    kept = {one.path for _, record in records if record and record.key in live for one in record.objects}
    dead = [_relative(store, path) for path, record in records if record is None or record.key not in live]
    objects = [path for path in walk(store.root) if _is_object(path) and path not in kept]
    groups = _empty_groups(store, kept, objects)
    listings = [*_dead_listings(store), *_dead_copies(store, live)]
    left = [_relative(store, path) for path in leftovers(store.root)]
    # No run goes on meanwhile: a training that was killed would begin anew.
    left += [path for path in walk(store.root) if kind_of(path) is Kind.checkpoint]
    garbage = [*dead, *objects, *groups, *listings, *left]
    size = sum((store.root / path).stat().st_size for path in garbage)
    return Garbage(tuple(dead), (*objects, *groups), tuple(listings), tuple(left), size)


def collect(store: Store, garbage: Garbage) -> None:
    """Removes garbage; hold :meth:`Store.maintenance` from finding it to here."""
    for path in garbage.records:
        remove_durably(store.root / path)
    for path in (*garbage.objects, *garbage.listings, *garbage.leftovers):
        (store.root / path).unlink(missing_ok=True)
    remove_leftovers(store.root)
    # Nobody holds one: they were left by writers that were killed.
    for lock in (store.root / "locks" / "units").glob("*.lock"):
        lock.unlink()
    for name in ("arrays", "tables", "files", "commits", "compact", "work"):
        _remove_empty_folders(store.root / name)


def _refuse_damaged_runs(store: Store) -> None:
    broken = [path.name for path in store.runs.paths() if load_run(path) is None]
    if broken:
        raise StoreError(
            f"runs/{broken[0]}: expected a whole run record, got a damaged one, so that what it refers to cannot "
            "be known; nothing was removed: run that study again, or `vitrine verify --repair` to forget it"
        )


def _is_object(path: str) -> bool:
    return kind_of(path) in (Kind.data, Kind.metadata)


def _empty_groups(store: Store, kept: set[str], objects: list[str]) -> list[str]:
    """The zarr.json of folders all of whose arrays go."""
    folders = {path.split("/", 3)[2] for path in kept if path.startswith("arrays/")}
    return [path for path in walk(store.root) if kind_of(path) is Kind.group and path.split("/")[2] not in folders]


def _dead_listings(store: Store) -> list[str]:
    live = {str(run.facts.get("listing")) for run in store.runs.all()}
    # Runs that an earlier version wrote do not name their listing.
    if "None" in live:
        return []
    found = (path for path in walk(store.root) if kind_of(path) is Kind.listing)
    return [path for path in found if Path(path).name.split(".")[0] not in live]


def _dead_copies(store: Store, live: set[str]) -> list[str]:
    """Compacted files with rows of commits that no run refers to: nobody reads them any more."""
    dead = [one.path for one in store.compacted.all() if not one.sources.keys() <= live]
    return [_relative(store, path) for file in dead for path in (file, file.with_suffix(".json")) if path.exists()]


def _remove_empty_folders(root: Path) -> None:
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):  # Not empty.
            folder.rmdir()


def _relative(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()
