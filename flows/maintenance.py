"""What keeps a store in order: verify and repair, forget runs, collect garbage."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from rich.filesize import decimal

from storage.gc import Garbage, collect, find_garbage
from storage.store import Store, open_store
from storage.verify import DamageKind, Verification, verify_store
from xai_core.errors import UsageError, nearest

WHOLE, DAMAGED = 0, 1


def verify(store: Path, repair: bool) -> int:
    """Hashes every committed object and prints the bad ones; returns 1 where some remain."""
    opened = open_store(store)
    with opened.maintenance() if repair else nullcontext():
        found = verify_store(opened, repair=repair)
    for one in found.damage:
        print(one)
    _print_verification(found, repair)
    remain = [one for one in found.damage if not repair or one.kind is DamageKind.foreign]
    return DAMAGED if remain else WHOLE


def _print_verification(found: Verification, repair: bool) -> None:
    if found.uncommitted:
        print(f"{len(found.uncommitted)} objects without a commit (nobody sees them): `vitrine gc` removes them")
    if not found.damage:
        print(f"{found.objects} objects are whole ({decimal(found.bytes)})")
        return
    counts = Counter(one.kind for one in found.damage)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    damaged = len(found.damage) - counts[DamageKind.foreign]
    if damaged:
        print(
            "the commits of what is damaged were dropped: run the study again to redo just these"
            if repair
            else "--repair drops the commits of what is damaged; running the study again then redoes just these"
        )
    if counts[DamageKind.foreign]:
        print("foreign files are not vitrine's: look at them and move or remove them by hand")


def delete(run_id: str, store: Path) -> None:
    """Forgets a run; what it shares with other runs stays theirs, the rest waits for the garbage collection."""
    opened = open_store(store)
    if opened.runs.read(run_id) is None:
        known = [one.run_id for one in opened.runs.all()]
        raise UsageError(f"RUN: expected a run of {store}, got {run_id!r}; {nearest(run_id, known)}")
    with opened.running(run_id):
        opened.runs.delete(run_id)
    garbage = find_garbage(opened)
    print(f"run {run_id} is forgotten; running its config again brings it back until `vitrine gc --delete`")
    print(f"{len(garbage.paths)} files ({decimal(garbage.bytes)}) belong to no run now")


def gc(store: Path, really: bool) -> None:
    """Prints what no run refers to, and removes it when told to."""
    opened = open_store(store)
    with opened.maintenance():
        garbage = find_garbage(opened)
        _print_garbage(garbage, opened, really)
        if really:
            collect(opened, garbage)


def _print_garbage(garbage: Garbage, store: Store, really: bool) -> None:
    if not garbage.paths:
        print("nothing to remove: every file belongs to a run")
        return
    for path in garbage.paths:
        print(path)
    print(
        f"{'removed' if really else 'would remove'} {len(garbage.records)} commits, "
        f"{len(garbage.objects)} objects, {len(garbage.listings)} listings, {len(garbage.leftovers)} leftovers: "
        f"{decimal(garbage.bytes)}"
    )
    if not really:
        print(f"nothing was removed: `vitrine gc --store {store.root} --delete` does it")
