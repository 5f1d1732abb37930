"""Stopping a run: Ctrl-C and a kill leave whole shards, no processes, and a run that goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from storage.runs import RunLog
from tests.conftest import TINY, config_with
from tests.flows.command import commits, executions, start, vitrine, wait_for, write_config

SLOW = config_with(
    TINY,
    methods=["grad_cam", {"name": "integrated_gradients", "steps": 24}],
    dataset={"images": 16},
    concepts={"layers": []},
    run={"shard_size": 1},
)
SECONDS_TO_END = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    write_config(folder / "slow.yaml", SLOW)
    return folder


def run_until(place: Path, units: int, *, server: bool, log: Path):
    """A run in the middle of its attribute stage, and all processes that belong to it."""
    process = start("run", "slow.yaml", "--store", "store", cwd=place, log=log, server=server)
    try:
        wait_for(lambda: len(commits(place / "store", "attribute")) >= units, f"{units} commits", process, log)
        return process, psutil.Process(process.pid).children(recursive=True)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def state(place: Path) -> str:
    return RunLog(place / "store" / "runs").all()[-1].state


def test_an_interrupt_and_a_kill_lose_no_shard_and_leave_no_process(place: Path, prefect_api: str) -> None:
    store = place / "store"

    # Ctrl-C in a terminal reaches every process of the group at once.
    log = place / "interrupted.log"
    process, children = run_until(place, 3, server=True, log=log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SECONDS_TO_END) == 1
    _, alive = psutil.wait_procs(children, timeout=SECONDS_TO_END)
    assert alive == []
    said = log.read_text()
    assert "resume with: vitrine run slow.yaml --store store" in said
    assert "Traceback" not in said
    assert "\x1b" not in said
    assert state(place) == "interrupted"
    kept = commits(store)
    assert 3 <= len(commits(store, "attribute")) < 32

    # A kill of the driver alone: its own server and workers end by themselves.
    log = place / "killed.log"
    process, children = run_until(place, len(commits(store, "attribute")) + 2, server=False, log=log)
    assert any("flows.server" in " ".join(child.cmdline()) for child in children)
    process.send_signal(signal.SIGKILL)
    process.wait(SECONDS_TO_END)
    _, alive = psutil.wait_procs(children, timeout=SECONDS_TO_END)
    assert alive == []
    more = commits(store)
    assert kept.items() <= more.items()
    assert 5 <= len(commits(store, "attribute")) < 32

    resumed = vitrine("run", "slow.yaml", "--store", "store", cwd=place)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    done = commits(store)
    assert more.items() <= done.items(), "a committed shard was done again"
    assert executions(resumed.stderr) == len(done) - len(more)
    assert state(place) == "complete"
    assert vitrine("verify", "--store", "store", cwd=place).returncode == 0


def test_a_second_writer_is_refused_while_a_run_goes_on(tmp_path: Path, prefect_api: str) -> None:
    # So many that it still goes on once four commands have started, however slow their imports are.
    write_config(tmp_path / "slow.yaml", config_with(SLOW, dataset={"images": 300}))
    log = tmp_path / "run.log"
    process = start("run", "slow.yaml", "--store", "store", cwd=tmp_path, log=log, server=True)
    try:
        wait_for(lambda: len(commits(tmp_path / "store")) >= 1, "a first commit", process, log)
        for command in (("run", "slow.yaml"), ("verify", "--repair")):
            refused = vitrine(*command, "--store", "store", cwd=tmp_path)
            assert refused.returncode == 2, refused.stderr[-2000:]
            assert f" is being written by process {process.pid} on " in refused.stderr
        # Readers are welcome meanwhile, and see whole shards.
        assert vitrine("status", "--store", "store", cwd=tmp_path).returncode == 0
        children = psutil.Process(process.pid).children(recursive=True)
        # A polite end, as a service manager sends it, stops as cleanly as Ctrl-C.
        process.terminate()
        assert process.wait(SECONDS_TO_END) == 1
        _, alive = psutil.wait_procs(children, timeout=SECONDS_TO_END)
        assert alive == []
        assert "resume with: " in log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
