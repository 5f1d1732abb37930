"""``vitrine quarantine``: which images of a run were set aside, where in the chain and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.sql_command import write_rows
from storage.store import Store, open_store
from tasks.quarantine_rows import merged_rows
from xai_core.errors import UsageError, nearest

COLUMNS = ("image_id", "path", "stage", "methods", "error", "message")


def quarantine(store: Path, run: str | None, format: str | None, output: Path | None) -> None:
    """Prints or writes what was set aside, one row an image and trouble, and counts it by stage and error.

    The counts stand under a table, and on standard error where the rows go elsewhere.

    Raises:
        UsageError: no such run, or a store without any.
    """
    opened = open_store(store)
    run_id = _chosen_run(opened, store, run)
    rows = quarantined_rows(opened, run_id)
    as_table = output is None and format in (None, "table")
    if rows or not as_table:
        write_rows(_as_arrow(rows, escaped=as_table), format, output)
    print(summary(rows, run_id), file=sys.stdout if as_table else sys.stderr)


def retry(store: Path, run: str | None) -> None:
    """Lets the next run try again what set images aside, and whatever rests on it.

    Raises:
        UsageError: no such run, or a store without any.
        StoreLockedError: the run goes on.
    """
    opened = open_store(store)
    run_id = _chosen_run(opened, store, run)
    with opened.running(run_id):
        again = [record for _, record in opened.records([run_id]) if record.facts["quarantined"]]
        for record in again:
            opened.attempts.again(record)
    if not again:
        print(summary([], run_id))
        return
    units = "unit" if len(again) == 1 else "units"
    print(f"{len(again)} {units} will be tried again: run the study's config again")


def quarantined_rows(store: Store, run_id: str) -> list[dict[str, Any]]:
    """What a run set aside, by image and then along the chain; ``methods`` as one text."""
    found = []
    for _, record in store.records([run_id]):
        if record.facts["quarantined"]:
            found += store.read_table(record, "quarantine").to_pylist()
    rows = merged_rows(sorted(found, key=_image_id))
    return [{**{name: row[name] for name in COLUMNS}, "methods": ", ".join(row["methods"])} for row in rows]


def summary(rows: list[dict[str, Any]], run_id: str) -> str:
    """How many images, and of which stage and error."""
    if not rows:
        return f"nothing is quarantined in run {run_id}"
    counts = Counter((row["stage"], row["error"]) for row in rows)
    images = len({row["image_id"] for row in rows})
    told = ", ".join(f"{stage} {error} {count}" for (stage, error), count in counts.items())
    return f"{images} {'image' if images == 1 else 'images'} quarantined in run {run_id}: {told}"


def _chosen_run(opened: Store, store: Path, run: str | None) -> str:
    if run is not None and opened.runs.read(run) is None:
        known = [one.run_id for one in opened.runs.all()]
        raise UsageError(f"--run: expected a run of {store}, got {run!r}; {nearest(run, known)}")
    latest = opened.runs.latest()
    if latest is None:
        raise UsageError(f"--store: expected a store with a run, {store} has none")
    return run or latest.run_id


def _image_id(row: Mapping[str, Any]) -> int:
    return int(row["image_id"])


def _as_arrow(rows: list[dict[str, Any]], *, escaped: bool) -> Any:
    """``escaped``: a line break in a file's name must not look like another row."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.int64() if name == "image_id" else pa.string()) for name in COLUMNS])
    if escaped:
        rows = [{name: _one_line(value) for name, value in row.items()} for row in rows]
    return pa.Table.from_pylist(rows, schema=schema)


def _one_line(value: Any) -> Any:
    return value.replace("\n", "\\n") if isinstance(value, str) else value
