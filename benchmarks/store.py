"""The store's own cost: a commit over the bare write of its shard, verifying, and planning many shards."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr

from benchmarks.timing import row
from storage.arrays import ArraySpec, encode_shard, ensure_array
from storage.canonical import digest_bytes
from storage.commits import CommitRecord, StoredObject, Unit, key_of
from storage.store import Store, open_store
from storage.verify import verify_store
from tasks.config import StudyConfig
from tasks.pipeline import STAGES
from tasks.plan import Planned, Planner
from tasks.sources import open_source
from tasks.study import Study

ROUNDS = 15
ROWS, SIDE = 512, 224
SHARDS = 10_000


def run(device: str) -> None:
    """Prints one row each for commit, verify and plan."""
    with tempfile.TemporaryDirectory() as folder:
        commit_overhead(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        verify_rate(Path(folder))
    for shards, per_shard in ((SHARDS // 5, 5), (SHARDS, 5)):
        with tempfile.TemporaryDirectory() as folder:
            plan_time(Path(folder), shards, per_shard)


def maps() -> np.ndarray:
    """A shard of smooth float16 maps, 51 MB: random 14 x 14 relevance, as upsampling leaves it."""
    import torch

    coarse = torch.randn(1, ROWS, 14, 14, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0]
    return (fine / fine.abs().amax()).half().numpy()


def commit_overhead(folder: Path) -> None:
    """A shard committed (fsync, hash, record) over its write without these, by this project and by zarr."""
    values = maps()
    spec = ArraySpec(ROWS, ROWS, (SIDE, SIDE), "float16", ("image", "y", "x"), {})
    store = open_store(folder / "store", create=True)
    ensure_array(folder / "bare" / "maps", spec)
    numbers = count()

    def by_zarr() -> None:
        array = zarr.open_array(folder / "bare" / "maps", mode="r+").with_config({"write_empty_chunks": True})
        array[:] = values

    def without_guards() -> None:
        with (folder / "bare" / "shard").open("wb") as stream:
            stream.writelines(encode_shard(spec, 0, values))

    def committed() -> None:
        unit, ingredients = Unit("attribute", "m", 0), {"number": next(numbers)}
        commit = store.begin(unit, key_of(ingredients), ingredients)
        commit.array("maps", "series", 0, values, spec)
        commit.finish({"images": ROWS, "ok": ROWS, "quarantined": 0})

    times: dict[str, list[float]] = {"by_zarr": [], "without_guards": [], "committed": []}
    for _ in range(ROUNDS):
        for function in (by_zarr, without_guards, committed):
            # What was written before must not be waited for here.
            os.sync()
            started = time.perf_counter()
            function()
            times[function.__name__].append(time.perf_counter() - started)
    size = f"{values.nbytes / 1e6:.0f} MB"
    for name in ("by_zarr", "without_guards"):
        ratio = median(c / b for c, b in zip(times["committed"], times[name], strict=True))
        row(
            f"commit of a {size} shard over its write {name}",
            ratio=ratio,
            write_ms=1e3 * median(times[name]),
            commit_ms=1e3 * median(times["committed"]),
        )


def verify_rate(folder: Path) -> None:
    """Megabytes a second of a full verification, files in the page cache."""
    store = open_store(folder / "store", create=True)
    values, shards = maps(), 8
    spec = ArraySpec(ROWS * shards, ROWS, (SIDE, SIDE), "float16", ("image", "y", "x"), {})
    for shard in range(shards):
        unit, ingredients = Unit("attribute", "m", shard), {"shard": shard}
        commit = store.begin(unit, key_of(ingredients), ingredients)
        commit.array("maps", "series", shard * ROWS, values, spec)
        commit.finish({"images": ROWS, "ok": ROWS, "quarantined": 0})
    verify_store(store)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        found = verify_store(store)
        rates.append(found.bytes / (time.perf_counter() - started) / 1e6)
    row(f"verify of {found.bytes / 1e6:.0f} MB", mb_per_s=median(rates))


def plan_time(folder: Path, shards: int, per_shard: int) -> None:
    """Seconds of a plan in which everything is done, the listing and shard digests known."""
    store = open_store(folder / "store", create=True)
    images = folder / "images" / "class"
    images.mkdir(parents=True)
    for number in range(shards):
        (images / f"{number:06d}.png").write_bytes(b"never decoded")
    document: dict[str, Any] = {
        "dataset": {"kind": "folder", "path": str(folder / "images")},
        "methods": ["grad_cam"],
        "metrics": ["insertion"],
        "run": {"shard_size": 1},
    }
    study = Study(StudyConfig.model_validate(document), store)
    planner = Planner(study)
    for stage in STAGES.values():
        for planned in planner.stage(stage):
            _pretend(store, planned)
    # A new process would list the images again; so does a source that is opened again.
    open_source.cache_clear()
    started = time.perf_counter()
    planned_units = Planner(Study(study.config, store)).all()
    seconds = time.perf_counter() - started
    due = [one for one in planned_units if one.reason is not None]
    assert not due, due[0]
    row(
        f"plan of {shards} shards, {len(planned_units)} units, all done",
        seconds=seconds,
        us_per_unit=1e6 * seconds / len(planned_units),
    )


def _pretend(store: Store, planned: Planned) -> None:
    """A committed unit with one small object, written without fsync."""
    work = planned.work
    assert work is not None
    content = str(planned.unit).encode()
    relative = f"files/{planned.unit.stage}/_-{work.key[:24]}-pretended.txt"
    path = store.root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    record = CommitRecord(
        work.key,
        planned.unit,
        work.ingredients,
        (StoredObject(relative, len(content), digest_bytes(content)),),
        {"images": 1, "ok": 1, "quarantined": 0, "content": digest_bytes(content), "seconds": 1.0},
    )
    place = store.commits.path(planned.unit, work.key)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(record.to_bytes())
