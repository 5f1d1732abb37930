"""Readers while a process writes: every query succeeds and sees whole shards only, in all their tables or in none.

The writer commits new shards until there are enough, and all the time does old ones again, as a run after a repair
does: it takes the record away, writes the same rows, and puts the record back.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from storage import sql
from storage.commits import Unit, key_of
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.store import Store, open_store
from tests.flows.command import VITRINE

FULL = bool(os.environ.get("VITRINE_FAULTS"))
READERS = 3
QUERIES = 1500 if FULL else 80
COMMANDS = 40 if FULL else 3
SHARDS = 60
SHARD_SIZE = 40
POINTS = 2
RUNS = ("one", "two")
PAUSE_SECONDS = 0.02

# Units of both tables that belong together, by the shard that their images tell.
COUNTS = f"""
select run_id, shard, n, images, total, points
from (
    select run_id, image_id // {SHARD_SIZE} as shard, count(*) as n, count(distinct image_id) as images,
           sum(value)::bigint as total
    from metrics group by all
) full join (
    select run_id, image_id // {SHARD_SIZE} as shard, count(*) as points from curves group by all
) using (run_id, shard)
"""


def unit_of(shard: int) -> tuple[Unit, str]:
    return Unit("metrics", "m", shard), key_of({"shard": shard})


def commit(store: Store, shard: int) -> None:
    unit, key = unit_of(shard)
    ids = list(range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE))
    each = [one for one in ids for _ in range(POINTS)]
    writing = store.begin(unit, key, {"shard": shard})
    columns = {
        "image_id": ids,
        "method": ["m"] * len(ids),
        "metric": ["x"] * len(ids),
        "value": [float(one) for one in ids],
        "reason": [None] * len(ids),
    }
    writing.table("metrics", rows_to_table("metrics", columns))
    points = {
        "image_id": each,
        "method": ["m"] * len(each),
        "curve": ["x"] * len(each),
        "step": list(range(POINTS)) * SHARD_SIZE,
        "fraction": [0.0] * len(each),
        "prob": [0.0] * len(each),
    }
    writing.table("curves", rows_to_table("curves", points))
    writing.finish({"images": SHARD_SIZE, "ok": SHARD_SIZE, "quarantined": 0})


def count_commit(root: Path) -> None:
    with root.with_suffix(".begun").open("ab") as begun:
        begun.write(b".")


def commits_begun(root: Path) -> int:
    try:
        return root.with_suffix(".begun").stat().st_size
    except FileNotFoundError:
        return 0


def write_until(stop: Event, root: Path) -> None:
    """The writer's process."""
    store, draw = open_store(root), random.Random(0)
    done = 0
    while not stop.wait(PAUSE_SECONDS):
        count_commit(root)
        new = done < SHARDS and draw.random() < 0.5
        if new or not done:
            commit(store, done)
            done += 1
        else:
            commit(store, draw.randrange(done))


@contextmanager
def written_meanwhile(root: Path) -> Iterator[Store]:
    """A store that another process writes for as long as the block lasts, proven by its being alive at the end."""
    store = open_store(root, create=True)
    for run_id in RUNS:
        run = RunRecord(run_id, run_id, {}, {})
        store.runs.write(run.with_keys(dict(unit_of(shard) for shard in range(SHARDS))))
    spawning = multiprocessing.get_context("spawn")
    stop = spawning.Event()
    writer = spawning.Process(target=write_until, args=(stop, root))
    writer.start()
    try:
        yield store
        assert writer.is_alive(), "the writer ended before the readers"
    finally:
        stop.set()
        writer.join(60)
        writer.kill()
    assert writer.exitcode == 0


@dataclass(frozen=True)
class Seen:
    """What one reader saw: in how many queries, and how many different sets of shards."""

    queries: int
    states: int
    most: int


def read(root: Path, queries: int) -> Seen:
    """A reader's process: queries one after the other, each checked on its own and against the one before."""
    states, before = set(), frozenset()
    for _ in range(queries):
        begun = commits_begun(root)
        shards = whole_shards(sql.query(open_store(root), COUNTS, threads=1).to_pylist())
        # Away for a moment is what was being done again while the query listed the commits: one shard, and more
        # only where the writer went on to the next meanwhile.
        most = 1 + commits_begun(root) - begun
        assert len(before - shards) <= most, f"shards went: {sorted(before - shards)}, of {most} done meanwhile"
        states.add(shards)
        before = shards
    return Seen(queries, len(states), max(map(len, states)))


def whole_shards(rows: list[dict[str, Any]]) -> frozenset[int]:
    """The shards that a query saw, each whole in both tables and under both runs."""
    of_run: dict[str, set[int]] = {run_id: set() for run_id in RUNS}
    for row in rows:
        first = row["shard"] * SHARD_SIZE
        assert row == {
            "run_id": row["run_id"],
            "shard": row["shard"],
            "n": SHARD_SIZE,
            "images": SHARD_SIZE,
            "total": sum(range(first, first + SHARD_SIZE)),
            "points": SHARD_SIZE * POINTS,
        }
        assert row["shard"] not in of_run[row["run_id"]], "a shard came twice"
        of_run[row["run_id"]].add(row["shard"])
    assert of_run[RUNS[0]] == of_run[RUNS[1]]
    return frozenset(of_run[RUNS[0]])


def test_every_query_sees_whole_shards_only(tmp_path: Path) -> None:
    root = tmp_path / "store"
    spawning = multiprocessing.get_context("spawn")
    with written_meanwhile(root), ProcessPoolExecutor(READERS, mp_context=spawning) as pool:
        readers = [pool.submit(read, root, QUERIES) for _ in range(READERS)]
        seen = [reader.result() for reader in readers]
    assert sum(one.queries for one in seen) == READERS * QUERIES
    assert all(one.states >= 5 for one in seen), seen
    assert all(one.most >= 5 for one in seen), seen


def test_the_command_reads_while_another_process_writes(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with written_meanwhile(root):
        for _ in range(COMMANDS):
            done = subprocess.run(
                [VITRINE, "sql", COUNTS, "--store", root, "--format", "json"], capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr.decode()
            whole_shards(json.loads(done.stdout))
