"""What the commands do; the command line only parses."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.errors import NoStoreError, QueryError, SourceError, StoreError, StoreLockedError
from storage.lock import exclusive
from storage.store import Store, open_store
from storage.verify import verify_store
from tasks.errors import StageError
from xai_core.errors import UsageError, nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from flows.study import RunResult

USAGE_ERRORS = (UsageError, SourceError, QueryError, StoreLockedError, NoStoreError)
RUN_ERRORS = (StageError, StoreError, OSError)

LISTED = ("name", "families", "options", "summary")

COMPLETE, FAILED, COMPLETE_WITH_QUARANTINE = 0, 1, 3


def run(config: Path | None, store: Path, overrides: list[str], limit: int | None) -> int:
    """Runs a study and prints its leaderboard and the path of its report; returns the exit code."""
    from flows.config import load_config
    from flows.study import run_study

    result = run_study(load_config(config, overrides, limit), store)
    _print_result(result, store)
    return COMPLETE_WITH_QUARANTINE if result.quarantined else COMPLETE


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
            f"{result.quarantined} images quarantined: vitrine sql 'select path, stage, message from quarantine' "
            f"--store {store}",
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
    due = sum(one.reason is not None for one in planned)
    print(f"{due} of {len(planned)} units would run" if due else "nothing to do")


def status(store: Path) -> None:
    """Prints the runs of a store, and of the last one how many units of each stage are committed."""
    opened = open_store(store)
    runs = opened.runs.all()
    _print_table(
        ["run", "state", "model", "images", "updated", "units done"],
        [
            [
                one.run_id,
                one.state,
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


def _done_of(store: Store, units: dict[Any, str]) -> str:
    done = sum(store.done(unit, key) is not None for unit, key in units.items())
    return f"{done}/{len(units)}"


def verify(store: Path, repair: bool) -> int:
    """Hashes every committed object and prints the bad ones; returns 1 where some remain."""
    opened = open_store(store)
    with exclusive(opened.lock_path) if repair else nullcontext():
        checked, damage = verify_store(opened, repair=repair)
    for one in damage:
        print(f"{one.kind}: {one.path} ({one.unit})")
    if not damage:
        print(f"{checked} objects are whole")
        return COMPLETE
    print(
        f"{len(damage)} of {checked} objects are damaged; "
        + ("their commits were dropped: run again to redo them" if repair else "drop their commits with --repair")
    )
    return COMPLETE if repair else FAILED


def sql(query: str | None, store: Path, rows: str, output: Path | None, timeout: float, tables: bool) -> None:
    """Prints or writes the rows of a query."""
    from storage import sql as engine

    opened = open_store(store)
    if tables or query is None:
        print("\n".join(engine.table_names()))
        return
    result = engine.query(opened, query, timeout=timeout)
    _write_rows(result, rows, output)


def _write_rows(table: pa.Table, rows: str, output: Path | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if rows == "table" and output is None:
        _print_table(table.column_names, [[_cell(v) for v in row.values()] for row in table.to_pylist()])
        return
    stream = output.open("wb") if output else sys.stdout.buffer
    if rows == "json":
        stream.write(json.dumps(table.to_pylist(), default=str, indent=1).encode() + b"\n")
    elif rows == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        stream.write(sink.getvalue())
    else:
        _write_csv(table, stream)
    stream.flush()
    if output:
        stream.close()


def _write_csv(table: pa.Table, stream: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    try:
        pacsv.write_csv(table, stream)
    except pa.ArrowException as error:
        raise QueryError(f"--format csv: {error}; cast lists and structs to text, or use json") from None


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
    """Options as they are written in a config, anything else as it is."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name}: {json.dumps(default)}" for name, default in value.items())


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
