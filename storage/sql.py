"""SQL over the store for people: DuckDB on registered datasets, locked before the user's text is read.

Everything a query may see is registered first; then external access is switched off and the configuration
locked, so that no statement can read or write a file, whatever its shape. The lock is the guard; that only one
statement which returns rows is taken comes on top of it, so that nobody believes to have changed something.

What a single call of a scalar function does (``repeat``, ``list_sort``) DuckDB neither interrupts nor counts as
memory: who does not trust a query gives it to ``storage.sql_process``, which can be killed.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from storage.errors import QueryError, StoreError
from storage.limits import Limits
from storage.runs import RunRecord
from storage.schema import METHOD_INFO, METRIC_INFO, RUNS, TABLES
from storage.views import DESCRIPTIONS, VIEWS

if TYPE_CHECKING:
    from storage.commits import CommitRecord
    from storage.store import Store

BATCH_ROWS = 50_000
INTERRUPT_EVERY = 0.1
# How DuckDB's messages begin when a registered data set could not be read.
SCAN_FAILED = "reading the stream registered as"

REGISTERED = {"runs": RUNS, "metric_info": METRIC_INFO, "method_info": METHOD_INFO}
RUN_ID = pa.field("run_id", pa.string())

# In this order: after the last no setting can be changed any more.
LOCK = (
    "set timezone = 'UTC'",
    "set temp_directory = ''",
    "set allow_persistent_secrets = false",
    "set allow_community_extensions = false",
    "set autoinstall_known_extensions = false",
    "set autoload_known_extensions = false",
    "set enable_external_access = false",
    "set lock_configuration = true",
)

# What returns rows and changes nothing; MULTI is how PIVOT arrives.
READING = frozenset({duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI})


@dataclass(frozen=True)
class Relation:
    """Something that can be queried: a table or a view, with its columns and their types in SQL."""

    name: str
    kind: str
    description: str
    columns: Mapping[str, str]


def connect(
    store: Store, run_ids: Iterable[str] | None = None, *, memory_limit: str = "1GB", threads: int = 2
) -> duckdb.DuckDBPyConnection:
    """A locked connection with every table and view, over some runs or all.

    Raises:
        QueryError: a memory limit that is no size, or fewer than one thread.
    """
    limits = Limits(memory_limit=memory_limit, threads=threads)
    connection = unlocked(store, run_ids)
    for statement in (
        f"set memory_limit = '{limits.memory_bytes}B'",
        f"set threads = {limits.threads}",
        *LOCK,
    ):
        connection.execute(statement)
    return connection


def unlocked(store: Store, run_ids: Iterable[str] | None = None) -> duckdb.DuckDBPyConnection:
    """A connection with every table and view that is not locked yet: only for texts that are our own."""
    chosen = None if run_ids is None else set(run_ids)
    members = list(store.records(chosen))
    runs = [run for run in store.runs.all() if chosen is None or run.run_id in chosen]
    return _registered(
        {
            **{name: _of_runs(store, name, members) for name in TABLES},
            "runs": _runs(runs),
            "metric_info": _info(runs, "metric_info", METRIC_INFO),
            "method_info": _info(runs, "method_info", METHOD_INFO),
        }
    )


def query(
    store: Store,
    text: str,
    *,
    timeout: float = 60.0,
    run_ids: Iterable[str] | None = None,
    memory_limit: str = "1GB",
    threads: int = 2,
) -> pa.Table:
    """The result of one SQL text as an Arrow table; columns of the same name are numbered.

    ``timeout`` in seconds, the opening of the store included; ``memory_limit`` holds for the work of the query and
    once more for its result.

    Raises:
        QueryError: the query is wrong, is not one statement that returns rows, asks for something outside the
            store, or goes past a limit.
        StoreError: a committed file is damaged, or was removed while the query ran.
    """
    limits = Limits(timeout, memory_limit, threads)
    started = time.monotonic()
    connection = connect(store, run_ids, memory_limit=memory_limit, threads=threads)
    try:
        opened = time.monotonic() - started
        if opened >= timeout:
            raise QueryError(
                f"opening the store took {opened:.1f} s of {timeout:g} s; raise --timeout or name one run"
            )
        with _interrupted_after(connection, timeout - opened):
            return _collected(connection, text, limits)
    except duckdb.InterruptException:
        raise QueryError(
            f"the query ran past {timeout:g} s and was stopped; narrow it or raise --timeout"
        ) from None
    except (duckdb.OutOfMemoryException, MemoryError):
        raise QueryError(
            f"the query needs more memory than {memory_limit} (nothing is moved to disk); "
            "narrow it or raise --memory"
        ) from None
    except duckdb.CatalogException as error:
        raise QueryError(f"{error}; the tables are: {', '.join(table_names())}") from None
    except (duckdb.Error, pa.ArrowException) as error:
        if SCAN_FAILED in str(error):
            raise StoreError(
                f"{error}; a file is damaged, or was removed while the query ran: see `vitrine verify`"
            ) from None
        raise QueryError(str(error)) from None
    finally:
        connection.close()


def table_names() -> list[str]:
    """What can be queried."""
    return sorted([*TABLES, *REGISTERED, *(view.name for view in VIEWS)])


def catalogue() -> list[Relation]:
    """Every table and view with its description and columns; the same for all stores."""
    schemas = {**{name: _with_run_id(name) for name in TABLES}, **REGISTERED}
    connection = _registered({name: schema.empty_table() for name, schema in schemas.items()})
    views = {view.name: view.description for view in VIEWS}
    with connection:
        return [
            Relation(
                name,
                "view" if name in views else "table",
                views.get(name) or DESCRIPTIONS[name],
                {row[0]: row[1] for row in connection.execute(f"describe {name}").fetchall()},
            )
            for name in table_names()
        ]


def _registered(tables: Mapping[str, Any]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    connection.execute("set python_enable_replacements = false")
    for name, table in tables.items():
        connection.register(name, table)
    for view in VIEWS:
        connection.execute(f"create view {view.name} as {view.sql}")
    return connection


def _of_runs(store: Store, name: str, members: list[tuple[str, CommitRecord]]) -> pads.Dataset:
    """A table's committed files, each once for every run that refers to it, with that run's id as a column.

    The id belongs to the file, not to its rows: it costs nothing to read, and asking for a run skips all others.
    """
    from storage.store import PARQUET

    records_of = defaultdict(list)
    for run_id, record in members:
        records_of[run_id].append(record)
    system = store.filesystem
    fragments = [
        PARQUET.make_fragment(path, system, partition_expression=pads.field(RUN_ID.name) == run_id)
        for run_id, records in records_of.items()
        for path in store.files(name, records)
    ]
    if not fragments:
        return pads.dataset(_with_run_id(name).empty_table())
    return pads.FileSystemDataset(fragments, _with_run_id(name), PARQUET, system)


def _with_run_id(name: str) -> pa.Schema:
    return TABLES[name].insert(0, RUN_ID)


def _collected(connection: duckdb.DuckDBPyConnection, text: str, limits: Limits) -> pa.Table:
    """The rows, batch by batch: DuckDB does not count the result as memory of the query."""
    relation = connection.sql(_one_statement(connection, text))
    if relation is None:
        return pa.table({})
    reader = relation.to_arrow_reader(BATCH_ROWS)
    batches, held = [], 0
    for batch in reader:
        batches.append(batch)
        held += batch.nbytes
        if held > limits.memory_bytes:
            raise QueryError(
                f"the result is larger than {limits.memory_limit}; select fewer columns, add a limit or raise "
                "--memory"
            )
    return _with_distinct_names(pa.Table.from_batches(batches, reader.schema))


def _one_statement(connection: duckdb.DuckDBPyConnection, text: str) -> duckdb.Statement:
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise QueryError(f"expected a query in UTF-8, got {text!r}")
    statements = connection.extract_statements(text)
    if len(statements) != 1:
        raise QueryError(f"expected one statement, got {len(statements)}")
    kind = _kind_of(statements[0])
    if kind not in READING:
        raise QueryError(
            "expected a statement that returns rows (SELECT, FROM, WITH, VALUES, PIVOT, DESCRIBE, SUMMARIZE, "
            f"SHOW, EXPLAIN), got {kind.name if kind else 'another'}: a query cannot change the store"
        )
    return statements[0]


def _kind_of(statement: duckdb.Statement) -> duckdb.StatementType | None:
    """None for a kind that DuckDB's Python module has no name for."""
    try:
        return statement.type
    except ValueError:
        return None


def _with_distinct_names(table: pa.Table) -> pa.Table:
    """Columns of the same name are numbered, as most formats could not hold them."""
    names: list[str] = []
    for name in table.column_names:
        others = (f"{name}_{number}" for number in count(1))
        free = (one for one in others if one not in names and one not in table.column_names)
        names.append(name if name not in names else next(free))
    return table.rename_columns(names)


@contextmanager
def _interrupted_after(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupts what the block runs on a connection, again and again once the time is over.

    Once is not enough: an interrupt that comes while nothing is running is lost.
    """
    over = threading.Event()

    def watch() -> None:
        if not over.wait(seconds):
            connection.interrupt()
            while not over.wait(INTERRUPT_EVERY):
                connection.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _runs(runs: list[RunRecord]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "run_id": run.run_id,
                "name": run.name,
                "state": run.state,
                "created": datetime.fromisoformat(run.created),
                "updated": datetime.fromisoformat(run.updated),
                "vitrine_version": run.versions.get("vitrine"),
                "model": run.facts.get("model"),
                "images": run.facts.get("images"),
                "config": json.dumps(run.config),
                "versions": json.dumps(run.versions),
            }
            for run in runs
        ],
        schema=RUNS,
    )


def _info(runs: list[RunRecord], name: str, schema: pa.Schema) -> pa.Table:
    rows = [{"run_id": run.run_id, **row} for run in runs for row in run.tables.get(name, [])]
    return pa.Table.from_pylist(rows, schema=schema)
