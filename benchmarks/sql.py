"""SQL on 3 million metric rows in 1000 files: opening the store and asking it, in seconds.

1000 units are committed as a study of 100 000 images would: five methods, 200 shards of 500 images, six metrics.
Opening is reading and checking the 1000 records, registering the files and locking DuckDB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.timing import alternate, median, row
from storage.commits import Unit, key_of
from storage.runs import RunRecord
from storage.schema import TABLES
from storage.sql import connect, query
from storage.store import Store, open_store

METHODS = ("grad_cam", "integrated_gradients", "kl_hessian", "occlusion[window=16]", "srd")
METRICS = {
    "insertion[steps=50]": True,
    "deletion[steps=50]": False,
    "aopc[steps=50]": True,
    "p_insertion": True,
    "p_deletion": False,
    "p_aopc": True,
}
SHARDS = 200
SHARD_SIZE = 500
UNDEFINED = 0.01
REPEATS = 5
RUN = "benchmark"

QUERIES = {
    "leaderboard": "select * from leaderboard",
    "a group by method and metric": "select method, metric, avg(value) from metrics group by all",
    "worst_images of one method and metric": "select * from worst_images where method = 'srd' "
    "and metric = 'p_aopc'",
    "best_method_per_image, wins of a metric": "select method, sum(1 / tied) from best_method_per_image "
    "where metric = 'p_aopc' group by method",
}


def run(device: str) -> None:
    """Builds the store, then measures opening it and the queries; medians of five rounds after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = build(Path(folder) / "store")
        row(f"built: {SHARDS * len(METHODS)} commits", seconds=time.perf_counter() - started)
        opening = alternate({"opening": lambda: connect(store).close()}, REPEATS, "cpu")["opening"]
        row("opening", median=median(opening), slowest=max(opening))
        asked = {name: lambda text=text: query(store, text) for name, text in QUERIES.items()}
        opened = connect(store)
        inside = {name: lambda text=text: opened.sql(text).to_arrow_table() for name, text in QUERIES.items()}
        for name in QUERIES:
            alone = alternate({"query": inside[name], "whole": asked[name]}, REPEATS, "cpu")
            row(name, query=median(alone["query"]), with_opening=median(alone["whole"]))
        command = [sys.executable, "-m", "flows.cli", "sql", QUERIES["leaderboard"], "--store", str(store.root)]
        process = alternate({"it": lambda: subprocess.run(command, check=True, capture_output=True)}, 3, "cpu")
        row("vitrine sql, the whole command", median=median(process["it"]))


def build(root: Path) -> Store:
    """A store with one run of metrics alone."""
    store = open_store(root, create=True)
    generator = np.random.default_rng(0)
    keys = dict(
        commit(store, Unit("metrics", method, shard), generator) for shard in range(SHARDS) for method in METHODS
    )
    info = [
        {"metric": name, "higher_is_better": higher, "lower_bound": None, "upper_bound": None}
        | {"definition": "", "undefined": "", "paper": ""}
        for name, higher in METRICS.items()
    ]
    run = RunRecord(RUN, RUN, {"name": RUN}, {"vitrine": "0"}, "complete", tables={"metric_info": info})
    store.runs.write(run.with_keys(keys))
    return store


def commit(store: Store, unit: Unit, generator: np.random.Generator) -> tuple[Unit, str]:
    """One shard's metrics of one method; some values are undefined."""
    ingredients = {"stage": unit.stage, "variant": unit.variant, "shard": unit.shard}
    key = key_of(ingredients)
    images = np.arange(SHARD_SIZE) + unit.shard * SHARD_SIZE
    count = SHARD_SIZE * len(METRICS)
    values = generator.beta(2, 2 + METHODS.index(unit.variant), count)
    undefined = generator.random(count) < UNDEFINED
    columns = {
        "image_id": np.repeat(images, len(METRICS)),
        "method": pa.array([unit.variant] * count),
        "metric": pa.array(list(METRICS) * SHARD_SIZE),
        "value": pa.array(values, mask=undefined),
        "reason": pa.array(np.where(undefined, "the map is constant", None)),
    }
    writing = store.begin(unit, key, ingredients)
    writing.table("metrics", pa.table(columns, schema=TABLES["metrics"]))
    writing.finish({"images": SHARD_SIZE, "ok": SHARD_SIZE, "quarantined": 0})
    return unit, key
