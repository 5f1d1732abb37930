"""SIGKILL at random times, again and again: the results are a clean run's, and little is done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from storage.errors import NoStoreError
from storage.store import open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import FULL, Faults, Warm, committed, digest, start_vitrine, temporary, units
from tests.flows.command import write_config

KILLS = 20
# Longer and longer lives after the kills that were asked for: the loop ends.
LENGTHEN = 1.3

STUDY = config_with(
    TINY,
    methods=["grad_cam", {"name": "integrated_gradients", "steps": 2}],
    metrics=["p_deletion"],
    concepts={"layers": []},
    run={"shard_size": 2},
)
WORKERS = 2
SLOW = config_with(
    TINY,
    methods=["grad_cam", {"name": "integrated_gradients", "steps": 100}],
    dataset={"images": 40},
    run={"shard_size": 1},
    compute={"workers": WORKERS},
)
SECONDS_TO_END = 60


def done(root: Path) -> set[str]:
    """Keys of what is committed, in a store that may not even be there yet."""
    try:
        return set(committed(open_store(root)).values())
    except NoStoreError:
        return set()


def test_a_chain_that_is_killed_at_random_times_ends_as_a_clean_one(warm: Warm, tmp_path: Path) -> None:
    clean = warm.clean(STUDY)
    chance = random.Random(7)
    kills = stores = 0
    while kills < KILLS:
        stores += 1
        folder = tmp_path / str(stores)
        folder.mkdir()
        faults, root, here = Faults(folder), folder / "store", 0
        life = clean.seconds / 5
        while True:
            before = done(root)
            child = warm.start(STUDY, root, faults)
            time.sleep(chance.uniform(0, life))
            os.kill(child, signal.SIGKILL)
            status = warm.wait(child)
            if status == 0:
                break
            assert status == -signal.SIGKILL, warm.said()
            here += 1
            assert before <= done(root), "what was committed is there no longer"
            if kills + here >= KILLS:
                life *= LENGTHEN
        kills += here
        assert digest(root) == clean.digest
        assert temporary(root) == []
        total = len(units(open_store(root)))
        assert total <= faults.begun().total() <= total + here
    assert kills >= KILLS


@pytest.mark.skipif(not FULL, reason="minutes long: set VITRINE_FAULTS=full")
def test_a_real_run_that_is_killed_at_random_times_ends_as_a_clean_one(warm: Warm, tmp_path: Path) -> None:
    clean = warm.clean(SLOW)
    write_config(tmp_path / "slow.yaml", SLOW)
    root, log, faults = tmp_path / "store", tmp_path / "run.log", Faults(tmp_path)
    chance = random.Random(7)
    kills, begun, life = [], 0.0, 0.0
    while True:
        before = done(root)
        started = time.monotonic()
        run = start_vitrine(
            "run", "slow.yaml", "--store", "store", cwd=tmp_path, log=log, environment=faults.environment()
        )
        if life == 0.0:
            begun = _seconds_to_first_unit(run, faults, started)
            life = begun + 4.0
        try:
            status = run.wait(chance.uniform(0.6 * begun, life))
            assert status == 0, log.read_text()[-3000:]
            break
        except subprocess.TimeoutExpired:
            family = psutil.Process(run.pid).children(recursive=True)
            kills.append(chance.choice(("driver", "group")))
            os.kill(run.pid, signal.SIGKILL) if kills[-1] == "driver" else os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        assert before <= done(root), "what was committed is there no longer"
        # Half of the time the next run begins while orphans may still be at work.
        if chance.random() < 0.5:
            assert psutil.wait_procs(family, timeout=SECONDS_TO_END)[1] == []
        if len(kills) >= KILLS:
            life *= LENGTHEN
    assert len(kills) >= KILLS
    assert {"driver", "group"} <= set(kills)
    assert digest(root) == clean.digest
    assert temporary(root) == []
    total = len(units(open_store(root)))
    assert total <= faults.begun().total() <= total + len(kills) * WORKERS


def _seconds_to_first_unit(run: subprocess.Popen[bytes], faults: Faults, started: float) -> float:
    while not faults.begun():
        assert run.poll() is None
        time.sleep(0.05)
    return time.monotonic() - started
