"""Doing one unit of work: whole or not at all, wherever it is sent."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from storage.attempts import attempt_of
from storage.commits import CommitRecord, Unit
from storage.errors import StoreLockedError
from storage.schema import rows_to_table
from storage.store import Store, open_store
from tasks.pipeline import STAGES
from tasks.stage import Context, Outcome, Work


@dataclass(frozen=True)
class Receipt:
    """What comes back from a unit: small, since everything else is in the store.

    ``executed`` is false where the unit had been committed in the meantime.
    """

    unit: Unit
    images: int
    ok: int
    quarantined: int
    seconds: float
    executed: bool = True


@dataclass(frozen=True)
class Busy:
    """A unit that another process writes at this moment: its result can be used once that one is done."""

    unit: Unit
    reason: str


@dataclass(frozen=True)
class Failure:
    """A unit that could not be done, and why."""

    unit: Unit
    error: str


def execute(work: Work, device: str = "cpu") -> Receipt | Busy:
    """Runs a unit's shard function and commits what it wrote; what is committed already is not done again."""
    store = open_store(work.store)
    try:
        with store.writing(work.unit, work.key):
            done = store.done(work.unit, work.key)
            return _execute(work, store, device) if done is None else _receipt_of(done)
    except StoreLockedError as error:
        return Busy(work.unit, str(error))


def _receipt_of(record: CommitRecord) -> Receipt:
    """The receipt of a unit that had been committed in the meantime."""
    facts = record.facts
    return Receipt(record.unit, facts["images"], facts["ok"], facts["quarantined"], 0.0, executed=False)


def _execute(work: Work, store: Store, device: str) -> Receipt:
    """Does the work, with its quarantined images and its timing; the unit's key is held."""
    started = time.perf_counter()
    commit = store.begin(work.unit, work.key, work.ingredients)
    context = Context(work, store, commit, device)
    outcome = STAGES[work.unit.stage].run(context)
    _reconcile(work.unit, outcome)
    _write_quarantine(context, outcome)
    seconds = time.perf_counter() - started
    _write_timing(context, outcome, seconds)
    commit.finish(
        {
            **outcome.facts,
            "images": outcome.images,
            "ok": outcome.ok,
            "quarantined": len(outcome.bad),
            "seconds": seconds,
        }
    )
    return Receipt(work.unit, outcome.images, outcome.ok, len(outcome.bad), seconds)


def _reconcile(unit: Unit, outcome: Outcome) -> None:
    """Refuses to commit a unit that lost an image without saying so."""
    if outcome.images != outcome.ok + len(outcome.bad):
        raise RuntimeError(
            f"{unit}: expected images in = ok + quarantined, got {outcome.images} in, {outcome.ok} ok and "
            f"{len(outcome.bad)} quarantined; nothing was committed"
        )


def _write_quarantine(context: Context, outcome: Outcome) -> None:
    unit = context.work.unit
    bad = outcome.bad
    context.commit.table(
        "quarantine",
        rows_to_table(
            "quarantine",
            {
                "image_id": [one.image_id for one in bad],
                "path": [one.path for one in bad],
                "stage": [unit.stage] * len(bad),
                "method": [unit.variant] * len(bad),
                "error": [one.error for one in bad],
                "message": [one.message for one in bad],
                "attempt": [attempt_of(context.work.ingredients)] * len(bad),
            },
        ),
    )


def _write_timing(context: Context, outcome: Outcome, seconds: float) -> None:
    unit = context.work.unit
    context.commit.table(
        "timings",
        rows_to_table(
            "timings",
            {
                "stage": [unit.stage],
                "method": [unit.variant],
                "shard": [unit.shard],
                "images": [outcome.images],
                "seconds": [seconds],
                "device": [context.device],
                "peak_bytes": [_peak_bytes(context.device)],
            },
        ),
    )


def _peak_bytes(device: str) -> int:
    """The most memory this process has held: on the GPU if it works there, else resident."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # Not Linux.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # A started process inherits its parent's ru_maxrss; the high-water mark is its own.
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
