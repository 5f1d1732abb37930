"""``vitrine sql``: asks the store in a process of its own and gives rows as text, CSV, JSON or Parquet."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from flows.pipes import silence_output
from storage.errors import QueryError
from storage.files import publish
from storage.sql_process import query_apart
from storage.store import Store, open_store
from xai_core.errors import UsageError, nearest

SHOWN_ROWS = 1000
JSON_ROWS = 4096
SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".txt": "table"}


def sql(
    query: str | None,
    store: Path,
    *,
    format: str | None,
    output: Path | None,
    runs: list[str],
    tables: bool,
    timeout: float,
    memory: str,
    threads: int,
) -> None:
    """Prints or writes the rows of a query, or with ``tables`` what can be queried.

    Raises:
        UsageError: neither a query nor ``tables``, or both; a run that the store does not have.
        QueryError: see :func:`storage.sql_process.query_apart` and :func:`write_rows`.
    """
    if tables == (query is not None):
        raise UsageError(
            "QUERY: expected a query or --tables, got "
            + ("both" if tables else "neither; `vitrine sql --tables` lists what can be queried")
        )
    if query is None:
        write_rows(_catalogue(nested=(format or _format_of(output)) == "json"), format, output)
        return
    opened = open_store(store)
    _require_runs(opened, runs)
    found = query_apart(opened, query, run_ids=runs or None, timeout=timeout, memory_limit=memory, threads=threads)
    write_rows(found, format, output)


def _require_runs(store: Store, runs: list[str]) -> None:
    known = [one.run_id for one in store.runs.all()] if runs else []
    for run in runs:
        if run not in known:
            raise UsageError(f"--run: expected a run of {store.root}, got {run!r}; {nearest(run, known)}")


def _catalogue(*, nested: bool) -> pa.Table:
    """Tables and views as rows; columns as one text, or ``nested`` as a list of names and types."""
    from storage.sql import catalogue

    return pa.Table.from_pylist(
        [
            {
                "name": one.name,
                "kind": one.kind,
                "description": one.description,
                "columns": [{"name": name, "type": kind} for name, kind in one.columns.items()]
                if nested
                else ", ".join(f"{name} {kind}" for name, kind in one.columns.items()),
            }
            for one in catalogue()
        ]
    )


def write_rows(table: pa.Table, format: str | None, output: Path | None) -> None:
    """Writes rows to a file, whole or not at all, or to standard output.

    ``format`` is ``table``, ``csv``, ``json`` or ``parquet``; None takes the one that the file's suffix names, and
    ``table`` where there is no file. ``table`` shows at most 1000 rows and says so. JSON has null for NaN and
    infinities, ISO 8601 for times. A reader that closes the pipe early ends it quietly.

    Raises:
        QueryError: the format cannot hold these columns, or ``output`` cannot be written to.
    """
    name = format or _format_of(output)
    if name == "parquet" and output is None and sys.stdout.isatty():
        raise QueryError("--format parquet: expected -o FILE or a pipe, got a terminal")
    write = WRITERS[name]
    if output is None:
        with _standard_output() as stream:
            write(table, stream)
    else:
        _to_file(output, lambda stream: write(table, stream))


def _format_of(output: Path | None) -> str:
    return "table" if output is None else SUFFIXES.get(output.suffix.lower(), "table")


def _to_file(output: Path, write: Callable[[BinaryIO], None]) -> None:
    """Through a temporary neighbour; a device or a pipe is written to as it is, never replaced."""
    target = output.resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise QueryError(f"-o: expected a file in a folder that exists, got {output}")
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            write(stream)
        return

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            write(stream)

    publish(target, fill)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    try:
        yield sys.stdout.buffer
        sys.stdout.flush()
    except BrokenPipeError:
        silence_output()


def _write_table(table: pa.Table, stream: BinaryIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A terminal wraps; a pipe or a file gets a wide page.
    to_terminal = stream is sys.stdout.buffer and sys.stdout.isatty()
    page = io.StringIO()
    width = Console().width if to_terminal else max(Console().width, 200)
    console = Console(file=page, width=width, force_terminal=to_terminal, no_color=not to_terminal)
    shown = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column in table.column_names:
        shown.add_column(Text(_printable(column)), overflow="fold")
    for row in _rows(table.slice(0, SHOWN_ROWS)):
        shown.add_row(*(Text(_cell(value)) for value in row))
    console.print(shown)
    if table.num_rows > SHOWN_ROWS:
        console.print(f"{SHOWN_ROWS} of {table.num_rows} rows; --format csv, json or parquet gives all")
    stream.write(page.getvalue().encode(errors="backslashreplace"))


def _write_csv(table: pa.Table, stream: BinaryIO) -> None:
    import pyarrow.csv as pacsv

    try:
        pacsv.write_csv(table, stream)
    except pa.ArrowException as error:
        raise QueryError(f"--format csv: {error}; cast lists, structs and bytes to text, or use json") from None


def _write_parquet(table: pa.Table, stream: BinaryIO) -> None:
    import pyarrow.parquet as pq

    whole = pa.BufferOutputStream()
    try:
        pq.write_table(table, whole)
    except pa.ArrowException as error:
        raise QueryError(f"--format parquet: {error}; cast that column to text") from None
    stream.write(whole.getvalue())


def _write_json(table: pa.Table, stream: BinaryIO) -> None:
    names = table.column_names
    opening = b"["
    for row in _rows(table):
        document = {name: _plain(value) for name, value in zip(names, row, strict=True)}
        stream.write(opening + b"\n " + json.dumps(document, allow_nan=False).encode())
        opening = b","
    stream.write((opening if table.num_rows == 0 else b"\n") + b"]\n")


WRITERS: dict[str, Callable[[pa.Table, BinaryIO], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Rows as Python values, some thousand at a time."""
    for batch in table.to_batches(max_chunksize=JSON_ROWS):
        try:
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
        except (OverflowError, ValueError) as error:
            raise QueryError(f"a value cannot be shown ({error}); cast that column to text") from None


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return int(value) if value.as_tuple().exponent == 0 else float(value)
        case datetime() | date() | time():
            return value.isoformat()
        case bytes():
            return value.hex()
        case dict():
            return {str(name): _plain(one) for name, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case None | bool() | int() | str():
            return value
    return str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    """Text without control characters: a file's name must not be able to steer the terminal."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text
    )
