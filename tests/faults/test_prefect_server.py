"""The Prefect API dies in mid-run: a server of our own is started again, the loss of another one ends the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import psutil
import pytest

from flows.api import NamedApi
from flows.server import LocalServer
from flows.unheeded import Unheeded
from storage.commits import KEY_CHARACTERS
from storage.store import open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import Faults, Warm, committed, digest, start_vitrine, units
from tests.flows.command import VITRINE, wait_for, write_config

STUDY = config_with(
    TINY,
    dataset={"images": 6},
    methods=["grad_cam"],
    metrics=["p_deletion"],
    concepts={"layers": []},
    run={"shard_size": 1},
    compute={"workers": 2},
)
IN_A_STAGE = {"moment": "write", "path": r"/arrays/attribute/grad_cam.*/maps/.*c\.4\."}
AT_THE_END = {"moment": "rename", "path": r"/commits/report/"}
SECONDS_TO_END = 150
# Nothing listens on the discard port.
NOBODY = "http://127.0.0.1:9/api"


class Run:
    """A real run that is held at a moment of it."""

    def __init__(
        self, folder: Path, name: str, api: str | None = None, hold: Mapping[str, str] = IN_A_STAGE
    ) -> None:
        (folder / name).mkdir()
        write_config(folder / "study.yaml", STUDY)
        self.faults = Faults(folder / name, hold=hold)
        self.log = folder / f"{name}.log"
        self.process = start_vitrine(
            *("run", "study.yaml", "--store", "store"),
            cwd=folder,
            log=self.log,
            environment=self.faults.environment(api),
            program=(str(VITRINE),),
        )
        self._family: set[psutil.Process] = set()
        self.until(lambda: self.faults.held, "the moment")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for a condition while the run goes on."""
        wait_for(condition, what, self.process, self.log)

    def server(self) -> psutil.Process | None:
        """The run's own Prefect server, where it lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return next((one for one in self._family if "flows.server" in _command(one)), None)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said, once every process of it is gone."""
        self.server()
        try:
            status = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        assert psutil.wait_procs(self._family, timeout=30)[1] == []
        return status, self.log.read_text()


def _command(process: psutil.Process) -> str:
    """A living process's command line; a dead one has none."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_lost_api_ends_the_run_and_a_server_of_its_own_is_started_again(warm: Warm, tmp_path: Path) -> None:
    store = tmp_path / "store"
    other = LocalServer(tmp_path / "other")
    try:
        other.wait()
        run = Run(tmp_path, "named", other.url)
        kept = committed(open_store(store))
        assert 0 < len(kept) < len(units(open_store(store)))
        os.kill(other.pid, signal.SIGKILL)
        status, said = run.end()
    finally:
        other.stop()
    assert status == 1, said[-3000:]
    (failed,) = (line for line in said.splitlines() if line.startswith("failed: "))
    assert failed.startswith(f"failed: PREFECT_API_URL: expected the Prefect API at {other.url} to answer as long")
    assert "start the API again, or unset PREFECT_API_URL" in failed
    assert said.splitlines()[-1] == "resume with: vitrine run study.yaml --store store"
    assert "Traceback" not in said
    assert open_store(store).runs.all()[0].state == "failed"
    assert kept.items() <= committed(open_store(store)).items()

    run = Run(tmp_path, "own")
    first = run.server()
    assert first is not None
    first.kill()
    run.until(lambda: run.server() not in (None, first), "another server")
    run.faults.release()
    status, said = run.end()
    assert status == 0, said[-3000:]
    assert said.count("Prefect server") == 1
    assert "the local Prefect server came to an end by SIGKILL; starting it again (1 of 3)" in said
    assert digest(store) == warm.clean(STUDY).digest
    # What was committed before the first loss was not done again.
    again = run.faults.begun().keys() & {key[:KEY_CHARACTERS] for key in kept.values()}
    assert again == set()


def test_a_run_whose_api_is_not_there_says_so_before_any_work(tmp_path: Path) -> None:
    write_config(tmp_path / "study.yaml", STUDY)
    environment = Faults(tmp_path).environment(NOBODY)
    log = tmp_path / "run.log"
    run = start_vitrine("run", "study.yaml", "--store", "store", cwd=tmp_path, log=log, environment=environment)
    assert run.wait(SECONDS_TO_END) == 1
    said = log.read_text()
    assert said.startswith(f"failed: PREFECT_API_URL: expected a Prefect API at {NOBODY}, got ")
    assert "Traceback" not in said
    assert committed(open_store(tmp_path / "store")) == {}


class Asks:
    """A listener that has nobody to tell."""

    def __init__(self) -> None:
        self.times = 0

    def begin(self, stage: str, units: int, images: int) -> None:
        self.times += 1
        httpx.get(NOBODY)

    def advance(self, receipt: object) -> None:
        self.times += 1
        raise LookupError("a defect")

    wait = advance

    def end(self, stage: str, executed: int, reused: int) -> None:
        self.times += 1


def test_trouble_in_telling_prefect_of_progress_spares_the_stage_and_defects_are_raised() -> None:
    asks = Asks()
    told = Unheeded(asks, NamedApi(NOBODY).trouble)
    told.begin("parts", 2, 4)
    told.wait("why")
    told.end("parts", 2, 0)
    assert asks.times == 1
    told.begin("metrics", 1, 4)
    assert asks.times == 2
    fresh = Unheeded(asks, NamedApi(NOBODY).trouble)
    with pytest.raises(LookupError, match="a defect"):
        fresh.wait("why")


def test_an_api_that_is_lost_when_all_is_done_does_not_undo_the_success(warm: Warm, tmp_path: Path) -> None:
    other = LocalServer(tmp_path / "other")
    try:
        other.wait()
        run = Run(tmp_path, "named", other.url, AT_THE_END)
        os.kill(other.pid, signal.SIGKILL)
        run.faults.release()
        status, said = run.end()
    finally:
        other.stop()
    assert status == 0, said[-3000:]
    assert "the run is complete, but Prefect was not told: " in said
    assert "Traceback" not in said
    assert digest(tmp_path / "store") == warm.clean(STUDY).digest


def test_a_server_that_cannot_be_kept_alive_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, "own")
    killed: set[psutil.Process] = set()
    while run.process.poll() is None:
        server = run.server()
        if server is not None:
            server.kill()
            killed.add(server)
    status, said = run.end()
    assert status == 1
    assert len(killed) == 4
    assert [f"starting it again ({number} of 3)" in said for number in (1, 2, 3)] == [True] * 3
    assert "expected it to run as long as the study, got an end by SIGKILL after 3 restarts" in said
    assert said.splitlines()[-1] == "resume with: vitrine run study.yaml --store store"
    assert "Traceback" not in said
    assert open_store(tmp_path / "store").runs.all()[0].state == "failed"
