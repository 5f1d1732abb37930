"""Dask workers that die in mid-unit: the run completes, little is redone, nothing stands twice in a table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.commits import KEY_CHARACTERS, Unit
from storage.schema import TABLES
from storage.store import Store, open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import Faults, Warm, committed, digest, start_vitrine, units
from tests.flows.command import LIMIT_SECONDS, wait_for, write_config

WORKERS = 2
STUDY = config_with(
    TINY,
    methods=["grad_cam", {"name": "integrated_gradients", "steps": 2}],
    concepts={"layers": []},
    run={"shard_size": 2},
    compute={"workers": WORKERS},
)
ILL = Unit("attribute", "grad_cam", 1)
# In the middle of the unit above, and at the end of one of the metrics stage.
IN_ATTRIBUTE = {"moment": "write", "path": r"/arrays/attribute/grad_cam.*/maps/.*c\.1\."}
IN_METRICS = {"moment": "rename", "path": r"/tables/metrics/.*metrics-0000003-"}
# A unit is given up when it took more workers with it than Dask allows to fail, by default 3.
ALLOWED = 3


def run(folder: Path, api: str, faults: Faults, **variables: str) -> tuple[int, str]:
    """Runs the study; its exit code and all that it and its workers said."""
    write_config(folder / "study.yaml", STUDY)
    log = folder / "run.log"
    log.write_bytes(b"")
    environment = {**faults.environment(api), **variables}
    process = start_vitrine("run", "study.yaml", "--store", "store", cwd=folder, log=log, environment=environment)
    return process.wait(LIMIT_SECONDS), log.read_text()


def doubled(store: Store) -> dict[str, int]:
    """Rows that stand more than once in what a query sees, by table."""
    views = [name for name in TABLES if name not in ("manifest", "targets")] + ["images"]
    counts = (f"select '{view}' as name, count(*) - count(distinct t) as n from {view} t" for view in views)
    return {row["name"]: row["n"] for row in store.sql(" union all ".join(counts)).to_pylist() if row["n"]}


def test_a_run_outlives_workers_that_are_killed_and_that_crash(
    warm: Warm, tmp_path: Path, prefect_api: str
) -> None:
    faults = Faults(tmp_path, ({**IN_ATTRIBUTE, "how": "SIGKILL"}, {**IN_METRICS, "how": "SIGSEGV"}))
    status, said = run(tmp_path, prefect_api, faults)
    assert status == 0, said[-3000:]
    (killed,), (crashed,) = faults.fired(0), faults.fired(1)
    assert killed.split()[0] != crashed.split()[0], "one process cannot die twice"

    store = open_store(tmp_path / "store")
    assert digest(store.root) == warm.clean(STUDY).digest
    assert doubled(store) == {}
    begun, expected = faults.begun(), units(store)
    assert set(begun) == {key[:KEY_CHARACTERS] for key in expected.values()}
    assert begun[expected[ILL][:KEY_CHARACTERS]] == 2
    # Beside its unit a dead worker takes along the receipt of the one before, which is then found done.
    assert len(expected) + 2 <= begun.total() <= len(expected) + 2 * 2


def test_a_unit_that_kills_its_workers_is_named_and_given_up_and_no_other_is(
    warm: Warm, tmp_path: Path, prefect_api: str
) -> None:
    faults = Faults(tmp_path, ({**IN_ATTRIBUTE, "times": 99},))
    status, said = run(tmp_path, prefect_api, faults, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=str(ALLOWED))
    assert status == 1
    # Dask also counts a worker that died of the unit's last attempt while the next one was on its way to it.
    deaths = len(faults.fired())
    assert min(2, ALLOWED + 1) <= deaths <= ALLOWED + 1
    (failed,) = (line for line in said.splitlines() if line.startswith("failed: "))
    assert f"1 of 12 units failed; the first, {ILL}: expected a worker to live through it" in failed
    assert f"got {ALLOWED + 1} that died with it in hand" in failed
    assert "lower run.batch_size" in failed
    assert "resume with: vitrine run study.yaml --store store" in said
    assert "Traceback" not in said

    store = open_store(tmp_path / "store")
    assert units(store).keys() - committed(store).keys() == {ILL}
    assert faults.begun()[units(store)[ILL][:KEY_CHARACTERS]] == deaths

    status, said = run(tmp_path, prefect_api, Faults(tmp_path))
    assert status == 0, said[-3000:]
    assert digest(store.root) == warm.clean(STUDY).digest


def test_a_lost_scheduler_ends_the_run_with_a_clear_error(
    tmp_path: Path, prefect_api: str, scheduler: Started
) -> None:
    config = {**STUDY, "compute": {"scheduler": scheduler.address}}
    write_config(tmp_path / "study.yaml", config)
    log = tmp_path / "run.log"
    process = start_vitrine(
        *("run", "study.yaml", "--store", "store"),
        cwd=tmp_path,
        log=log,
        environment=scheduler.faults.environment(prefect_api),
    )
    wait_for(lambda: scheduler.faults.held, "the middle of a unit", process, log)
    scheduler.process.kill()
    assert process.wait(LIMIT_SECONDS) == 1
    said = log.read_text()
    assert f"failed: compute.scheduler: expected the Dask scheduler at {scheduler.address} as long as" in said
    assert "resume with: vitrine run study.yaml --store store" in said
    assert "Traceback" not in said
    (record,) = open_store(tmp_path / "store").runs.all()
    assert record.state == "failed"


@dataclass(frozen=True)
class Started:
    """A Dask scheduler in a process of its own, whose one worker is held at its first unit."""

    process: subprocess.Popen[bytes]
    address: str
    faults: Faults


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Started]:
    faults = Faults(tmp_path, hold={"moment": "lock", "path": "/locks/units/"})
    file = tmp_path / "scheduler.json"
    cli = [sys.executable, "-m", "distributed.cli.dask_{}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    common = ["--no-dashboard", "--scheduler-file", str(file), "--host", "127.0.0.1"]
    begun = [
        subprocess.Popen([*cli[:2], cli[2].format("scheduler"), *common, "--port", "0"], **quiet),
        subprocess.Popen(
            [*cli[:2], cli[2].format("worker"), *common, "--nthreads", "1"], **quiet, env=faults.environment()
        ),
    ]
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not _has_worker(file):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Started(begun[0], json.loads(file.read_text())["address"], faults)
    finally:
        faults.release()
        for process in begun:
            process.terminate()
            process.wait(60)


def _has_worker(file: Path) -> bool:
    from distributed import Client

    if not file.exists():
        return False
    with Client(scheduler_file=str(file), set_as_default=False) as client:
        return bool(client.nthreads())
