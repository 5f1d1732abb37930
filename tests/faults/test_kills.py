"""SIGKILL at random times, again and again: the results are a clean run's, and little is done twice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from storage.errors import NoStoreError
from storage.store import open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import FULL, Faults, Warm, committed, digest, start_vitrine, temporary, units
from tests.flows.command import LIMIT_SECONDS, write_config

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
SECONDS_TO_START = 8.0
SECONDS_AT_WORK = 1.5
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


class RealRun:
    """``vitrine run`` in a process group of its own, with its server and its workers."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.log = folder / "run.log"
        self._begun_before = faults.begun().total()
        self.process = start_vitrine(
            *("run", "slow.yaml", "--store", "store"),
            cwd=folder,
            log=self.log,
            environment=faults.environment(),
        )

    def live(self, chance: random.Random) -> None:
        """Returns at a random time: mostly while units are at work, sometimes while everything still starts."""
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, SECONDS_TO_START))
            return
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.process.poll() is None and self.faults.begun().total() == self._begun_before:
            assert time.monotonic() < deadline, f"no unit was begun: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)
        time.sleep(chance.uniform(0, SECONDS_AT_WORK))

    def kill(self, chance: random.Random) -> str | None:
        """Kills the driver or its whole group; which, or None where the run had ended, and well."""
        status = self.process.poll()
        if status is not None:
            assert status == 0, self.log.read_text()[-3000:]
            return None
        family = psutil.Process(self.process.pid).children(recursive=True)
        whom = chance.choice(("driver", "group"))
        (os.kill if whom == "driver" else os.killpg)(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # Half of the time the next run begins while orphans may still be at work.
        if chance.random() < 0.5:
            assert psutil.wait_procs(family, timeout=SECONDS_TO_END)[1] == []
        return whom


@pytest.mark.skipif(not FULL, reason="minutes long: set VITRINE_FAULTS=full")
def test_a_real_run_that_is_killed_at_random_times_ends_as_a_clean_one(warm: Warm, tmp_path: Path) -> None:
    clean = warm.clean(SLOW)
    chance = random.Random(7)
    kills: list[str] = []
    stores = 0
    while len(kills) < KILLS:
        stores += 1
        folder = tmp_path / str(stores)
        folder.mkdir()
        write_config(folder / "slow.yaml", SLOW)
        faults, root, here = Faults(folder), folder / "store", 0
        while True:
            before = done(root)
            run = RealRun(folder, faults)
            if len(kills) < KILLS:
                run.live(chance)
            else:
                run.process.wait(LIMIT_SECONDS)
            whom = run.kill(chance)
            if whom is None:
                break
            kills.append(whom)
            here += 1
            assert before <= done(root), "what was committed is there no longer"
        assert digest(root) == clean.digest
        assert temporary(root) == []
        total = len(units(open_store(root)))
        assert total <= faults.begun().total() <= total + here * WORKERS
    assert {"driver", "group"} <= set(kills)
