"""The Prefect task of a stage: plans its shards, hands them to an executor, and keeps the books."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from storage.commits import Unit
from storage.store import Store
from tasks.errors import StageError
from tasks.execute import Busy, Failure, Receipt
from tasks.plan import Planned, Planner, to_run
from tasks.stage import Stage, Work

# How often units that another run writes are asked for again, and how long without any of them getting done.
BUSY_SECONDS = 1.0
PATIENCE_SECONDS = 3600.0


class Executor(Protocol):
    """Runs works in any order and yields for each, as it ends, a receipt, a failure or that it is busy."""

    def run(self, works: list[Work]) -> Iterator[Receipt | Failure | Busy]:
        """Runs all works."""


class Progress(Protocol):
    """Is told how a stage goes."""

    def begin(self, stage: str, units: int, images: int) -> None:
        """A stage starts with so many units to run."""

    def advance(self, receipt: Receipt) -> None:
        """One unit was committed."""

    def wait(self, reason: str) -> None:
        """Units are being written by another process; the stage waits for it."""

    def end(self, stage: str, executed: int, reused: int) -> None:
        """A stage is over."""


@dataclass(frozen=True)
class StageSummary:
    """What a stage did: units executed and reused, images treated and set aside, seconds in shard functions."""

    stage: str
    executed: int
    reused: int
    images: int
    quarantined: int
    seconds: float


def run_stage(
    stage: Stage,
    planner: Planner,
    executor: Executor,
    progress: Progress,
    note_keys: Callable[[dict[Unit, str]], None],
) -> StageSummary:
    """Runs what is not done of a stage; units that fail do not keep the others from being committed.

    Raises:
        StageError: some unit failed, or more images were set aside than ``run.max_bad_fraction`` allows.
    """
    planned = planner.stage(stage)
    note_keys({one.unit: one.key for one in planned if one.key is not None})
    works = to_run(planned)
    images = sum(work.stop - work.start for work in works) if stage.sharded else 0
    progress.begin(stage.name, len(works), images)
    receipts, failures = _collect(executor, works, progress)
    if failures:
        raise StageError(_describe(stage, failures, len(works)))
    reused = len(planned) - len(works)
    progress.end(stage.name, len(receipts), reused)
    summary = _summary(stage, planner, planned, receipts, reused)
    _check_budget(planner, summary)
    return summary


def _collect(executor: Executor, works: list[Work], progress: Progress) -> tuple[list[Receipt], list[Failure]]:
    """Runs all works; those that another run writes at this moment are asked for again once it is done."""
    receipts: list[Receipt] = []
    failures: list[Failure] = []
    patience = PATIENCE_SECONDS
    while works:
        busy = _run_once(executor, works, progress, receipts, failures)
        patience = PATIENCE_SECONDS if len(busy) < len(works) else patience - BUSY_SECONDS
        if busy and patience <= 0:
            return receipts, [*failures, *(Failure(one.unit, one.reason) for one in busy)]
        waiting = {one.unit for one in busy}
        works = [work for work in works if work.unit in waiting]
        if works:
            progress.wait(busy[0].reason)
            time.sleep(BUSY_SECONDS)
    return receipts, failures


def _run_once(
    executor: Executor,
    works: list[Work],
    progress: Progress,
    receipts: list[Receipt],
    failures: list[Failure],
) -> list[Busy]:
    busy = []
    for result in executor.run(works):
        if isinstance(result, Receipt):
            receipts.append(result)
            progress.advance(result)
        elif isinstance(result, Failure):
            failures.append(result)
        else:
            busy.append(result)
    return busy


def _describe(stage: Stage, failures: list[Failure], works: int) -> str:
    first = failures[0]
    return f"stage {stage.name}: {len(failures)} of {works} units failed; the first, {first.unit}: {first.error}"


def _summary(
    stage: Stage, planner: Planner, planned: list[Planned], receipts: list[Receipt], reused: int
) -> StageSummary:
    executed = [receipt for receipt in receipts if receipt.executed]
    return StageSummary(
        stage.name,
        len(executed),
        reused + len(receipts) - len(executed),
        sum(receipt.images for receipt in receipts),
        _quarantined(planner.study.store, planned),
        sum(receipt.seconds for receipt in receipts),
    )


def _quarantined(store: Store, planned: list[Planned]) -> int:
    """Images set aside by a stage, its reused units included: distinct ones, over all variants."""
    bad: set[int] = set()
    for one in planned:
        record = store.commits.read(one.unit, one.key) if one.key else None
        if record is not None and record.facts["quarantined"]:
            bad.update(store.read_table(record, "quarantine")["image_id"].to_pylist())
    return len(bad)


def _check_budget(planner: Planner, summary: StageSummary) -> None:
    study = planner.study
    allowed = study.config.run.max_bad_fraction
    if summary.quarantined > allowed * study.images:
        raise StageError(
            f"stage {summary.stage}: {summary.quarantined} of {study.images} images were quarantined, more than "
            f"run.max_bad_fraction = {allowed} allows; see `vitrine quarantine`, "
            "mend or remove them, or raise the budget"
        )


def stage_task(stage: Stage) -> Any:
    """The stage as a Prefect task of its own name; Prefect caches nothing, since truth is in the store."""
    from prefect import Task
    from prefect.cache_policies import NO_CACHE

    return Task(
        run_stage,
        name=stage.name,
        description=stage.summary,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=0,
    )
