"""What the commands do; the command line only parses."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import NoStoreError, QueryError, SourceError, StoreError, StoreLockedError
from storage.runs import RunRecord
from storage.store import Store, open_store
from tasks.errors import StageError
from xai_core.errors import ImageError, UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from flows.study import RunResult

USAGE_ERRORS = (UsageError, SourceError, QueryError, StoreLockedError, NoStoreError)
RUN_ERRORS = (StageError, StoreError, ImageError, OSError)

LISTED = ("name", "families", "family", "better", "bounds", "unit", "options", "summary")

# Less than a report: whatever failed, this is why.
LITTLE_ROOM = 8 << 20

COMPLETE, FAILED, COMPLETE_WITH_QUARANTINE = 0, 1, 3


def run(config: Path | None, store: Path, overrides: list[str], limit: int | None) -> int:
    """Runs a study and prints its leaderboard and the path of its report; returns the exit code."""
    from flows.config import load_config
    from flows.study import run_study

    try:
        result = run_study(load_config(config, overrides, limit), store)
    except (StageError, OSError, StoreError) as error:
        if not isinstance(error, StoreLockedError | NoStoreError) and (room := _free(store)) < LITTLE_ROOM:
            raise StoreError(f"{error}; the disk of {store} has {room >> 10} KiB left: make room") from error
        raise
    _print_result(result, store)
    return COMPLETE_WITH_QUARANTINE if result.quarantined else COMPLETE


def _free(path: Path) -> int:
    """Bytes that are free on the disk of a path, whether or not the path is there yet."""
    return shutil.disk_usage(next(one for one in (path, *path.resolve().parents) if one.exists())).free


def resume_command() -> str:
    """The command line that was given: running it again resumes."""
    return shlex.join(["vitrine", *sys.argv[1:]])


def _print_result(result: RunResult, store: Path) -> None:
    from flows.tables import leaderboard_table
    from tasks.leaderboard import leaderboard

    console = wide_console()
    rows = leaderboard(open_store(store), result.run_id)
    if rows:
        console.print(leaderboard_table(rows))
    if not result.executed:
        console.print("nothing to do: everything was done before", highlight=False)
    if result.quarantined:
        console.print(
            f"{result.quarantined} images quarantined, listed by: "
            f"{shlex.join(['vitrine', 'quarantine', '--store', str(store), '--run', result.run_id])}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"run     {result.run_id}", highlight=False, soft_wrap=True)
    console.print(f"report  {result.report}", highlight=False, soft_wrap=True)


def plan(config: Path | None, store: Path, overrides: list[str], limit: int | None) -> None:
    """Prints every unit that would run, with its reason; units of one kind are counted together."""
    from flows.config import load_config
    from tasks.plan import Planner
    from tasks.study import Study

    opened = open_store(store, create=True)
    planned = Planner(Study(load_config(config, overrides, limit), opened)).all()
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for one in planned:
        counts[one.unit.stage, one.unit.variant, one.reason or "done", one.detail] += 1
    _print_table(
        ["stage", "variant", "units", "state", "why"],
        [
            [stage, variant, str(count), reason, detail]
            for (stage, variant, reason, detail), count in counts.items()
        ],
    )
    due = sum(one.reason is not None and one.key is not None for one in planned)
    waiting = sum(one.key is None for one in planned)
    print(f"{due} of {len(planned)} units would run" if due else "nothing to do")
    if waiting:
        print(f"{waiting} more wait for the manifest: they run where it finds other images than are committed")


def status(store: Path) -> None:
    """Prints the runs of a store, and of the last one how many units of each stage are committed."""
    opened = open_store(store)
    runs = opened.runs.all()
    _print_table(
        ["run", "state", "model", "images", "updated", "units done"],
        [
            [
                one.run_id,
                _state_of(opened, one),
                str(one.facts.get("model")),
                str(one.facts.get("images")),
                one.updated,
                _done_of(opened, one.units()),
            ]
            for one in runs
        ],
    )
    if runs:
        _print_table(
            ["stage", "units done"],
            [
                [stage, _done_of(opened, {u: k for u, k in runs[-1].units().items() if u.stage == stage})]
                for stage in runs[-1].keys
            ],
        )


def _state_of(store: Store, run: RunRecord) -> str:
    """A run's state; one that was killed could not write that it ended."""
    return "killed" if run.state == "running" and not store.is_running(run.run_id) else run.state


def _done_of(store: Store, units: dict[Any, str]) -> str:
    done = sum(store.done(unit, key) is not None for unit, key in units.items())
    return f"{done}/{len(units)}"


def report(store: Path, run: str | None, output: Path | None) -> None:
    """Prints the path of a run's report, or copies it."""
    from flows.study import report_path

    opened = open_store(store)
    latest = opened.runs.latest()
    run_id = run or (latest.run_id if latest else None)
    if run_id is None:
        raise UsageError(f"--store: expected a store with a run, {store} has none")
    if opened.runs.read(run_id) is None:
        known = [one.run_id for one in opened.runs.all()]
        raise UsageError(f"--run: expected a run of {store}, got {run_id!r}; {nearest(run_id, known)}")
    path = report_path(opened, run_id)
    if output is not None:
        shutil.copyfile(path, output)
    print(output or path)


def explain(
    images: list[Path],
    config: Path | None,
    model: str | None,
    checkpoint: Path | None,
    method: list[str],
    target: int | None,
    output: Path,
    overrides: list[str],
) -> None:
    """Explains single pictures and prints what it found."""
    from flows.explain import Request, explain_pictures

    request = Request(config, model, checkpoint, tuple(method), target, tuple(overrides))
    for path, lines in explain_pictures(images, request, output):
        print(path)
        print("\n".join(f"  {line}" for line in lines))


def list_things(kind: str, pattern: str | None, rows: str) -> None:
    """Prints what is registered of a kind, or timm's models."""
    from flows.catalogue import catalogue

    entries = catalogue(kind, pattern)
    if rows == "json":
        print(json.dumps(entries, indent=1))
        return
    columns = [name for name in LISTED if entries and name in entries[0]]
    _print_table(columns, [[_listed(entry[column]) for column in columns] for entry in entries])


def _listed(value: Any) -> str:
    """Options as they are written in a config, bounds as an interval, anything else as it is."""
    from tasks.metric_families import interval

    if isinstance(value, dict):
        return ", ".join(f"{name}: {json.dumps(default)}" for name, default in value.items())
    return interval(value) if isinstance(value, tuple) else str(value)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(one.replace("[", "\\[") for one in row))
    wide_console().print(table)


def wide_console() -> Console:
    """The terminal, or a wide page for a pipe: wrapping belongs to terminals."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 200))
