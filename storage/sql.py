"""SQL over the store for people: DuckDB on registered datasets, locked before the user's text is read.

Everything a query may see is registered first; then external access is switched off and the configuration
locked, so that no statement can read or write a file, whatever its shape.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import duckdb
import pyarrow as pa

from storage.errors import QueryError
from storage.runs import RunRecord
from storage.schema import METHOD_INFO, METRIC_INFO, RUNS, TABLES
from storage.store import Store

# What people see as ``images`` is the manifest with the target that the predict stage fixed.
IMAGES_VIEW = """
create view images as
select m.*, t.target, t.target_name, t.correct
from manifest m left join targets t using (run_id, image_id)
"""


def connect(
    store: Store,
    run_ids: Iterable[str] | None = None,
    *,
    memory_limit: str = "1GB",
    threads: int = 2,
) -> duckdb.DuckDBPyConnection:
    """A locked connection with one view per table of the store."""
    connection = duckdb.connect(":memory:")
    connection.execute("set python_enable_replacements = false")
    chosen = None if run_ids is None else set(run_ids)
    members = list(store.records(chosen))
    connection.register("run_commits", _run_commits(members))
    records = list({record.key: record for _, record in members}.values())
    for name in TABLES:
        connection.register(f"{name}_files", store.dataset(name, records))
        connection.execute(
            f"create view {name} as select r.run_id, f.* exclude (commit) "
            f"from {name}_files f join run_commits r on r.commit = f.commit"
        )
    connection.execute(IMAGES_VIEW)
    runs = [run for run in store.runs.all() if chosen is None or run.run_id in chosen]
    connection.register("runs", _runs(runs))
    connection.register("metric_info", _info(runs, "metric_info", METRIC_INFO))
    connection.register("method_info", _info(runs, "method_info", METHOD_INFO))
    _lock(connection, memory_limit, threads)
    return connection


def query(store: Store, text: str, *, timeout: float = 60.0, **limits: Any) -> pa.Table:
    """The result of one SQL text as an Arrow table.

    Raises:
        QueryError: the query is wrong, asks for something outside the store, or runs past ``timeout`` seconds.
    """
    connection = connect(store, **limits)
    timer = threading.Timer(timeout, connection.interrupt)
    timer.start()
    try:
        result = connection.sql(text)
        return pa.table({}) if result is None else result.to_arrow_table()
    except duckdb.InterruptException:
        raise QueryError(
            f"the query ran past {timeout:g} s and was stopped; narrow it or raise --timeout"
        ) from None
    except duckdb.Error as error:
        raise QueryError(f"{error}; the tables are: {', '.join(table_names())}") from None
    finally:
        timer.cancel()
        connection.close()


def table_names() -> list[str]:
    """What can be queried."""
    return sorted([*TABLES, "images", "runs", "metric_info", "method_info"])


def _lock(connection: duckdb.DuckDBPyConnection, memory_limit: str, threads: int) -> None:
    connection.execute(f"set memory_limit = '{memory_limit}'")
    connection.execute(f"set threads = {threads}")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def _run_commits(members: list[tuple[str, Any]]) -> pa.Table:
    return pa.table(
        {"run_id": [run_id for run_id, _ in members], "commit": [record.key for _, record in members]},
        schema=pa.schema([("run_id", pa.string()), ("commit", pa.string())]),
    )


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
