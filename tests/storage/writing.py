"""Committing small units to a real store, for tests of what happens to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from storage.arrays import ArraySpec
from storage.commits import CommitRecord, Unit, key_of
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.store import Store

SHARD = 4
SPEC = ArraySpec(8, SHARD, (3,), "float32", ("image", "x"), {})


def metric_rows(ids: Iterable[int], method: str = "m") -> pa.Table:
    """One row of the table ``metrics`` for each image."""
    columns = [(image_id, method, "x", 0.5 + image_id, None) for image_id in ids]
    names = ("image_id", "method", "metric", "value", "reason")
    return rows_to_table("metrics", dict(zip(names, map(list, zip(*columns, strict=True)), strict=True)))


def commit(store: Store, shard: int, *, method: str = "grad_cam", series: str = "series") -> CommitRecord:
    """A unit with one table, one array shard, its metadata and one file."""
    unit = Unit("metrics", method, shard)
    ingredients = {"method": method, "series": series, "shard": shard}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    first = shard * SHARD
    writing.table("metrics", metric_rows(range(first, first + SHARD), method))
    writing.array("maps", series, first, np.full((SHARD, 3), shard + 1, np.float32), SPEC)
    writing.file("note", ".txt", f"shard {shard}".encode())
    return writing.finish({"images": SHARD, "ok": SHARD, "quarantined": 0})


def run_of(store: Store, run_id: str, records: Iterable[CommitRecord], **facts: Any) -> RunRecord:
    """A complete run that refers to these records."""
    run = RunRecord(run_id, run_id, {}, {}, state="complete", facts=facts)
    run = run.with_keys({record.unit: record.key for record in records})
    store.runs.write(run)
    return run


def tree(store: Store) -> Mapping[str, bytes]:
    """Every file of a store with its bytes."""
    return {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file() and "locks" not in path.parts
    }
