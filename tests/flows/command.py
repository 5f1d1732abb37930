"""The installed ``vitrine`` command as a process, and the same command inside this one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from flows.cli import app

VITRINE = Path(sys.executable).with_name("vitrine")
LIMIT_SECONDS = 300


def environment(*, server: bool) -> dict[str, str]:
    """This process's environment, with the session's Prefect server or without any."""
    drop = () if server else ("PREFECT_API_URL", "PREFECT_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "OMP_NUM_THREADS": "1"}


def vitrine(*arguments: object, cwd: Path, server: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; output as text."""
    return subprocess.run(
        [str(VITRINE), *map(str, arguments)],
        cwd=cwd,
        env=environment(server=server),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def start(*arguments: object, cwd: Path, log: Path, server: bool) -> subprocess.Popen[bytes]:
    """Starts the command as a terminal does: at the head of a process group of its own."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(VITRINE), *map(str, arguments)],
            cwd=cwd,
            env=environment(server=server),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command inside this process, for what starts nothing: importing takes seconds, the rest does not."""
    with contextlib.chdir(cwd):
        found = CliRunner().invoke(app, [str(one) for one in arguments], prog_name="vitrine")
    return subprocess.CompletedProcess([], found.exit_code, found.stdout, found.stderr)


def write_config(path: Path, document: dict[str, Any]) -> Path:
    """A config file."""
    path.write_text(yaml.safe_dump(document))
    return path


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once a condition holds while a process runs."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"waited in vain for {what}: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def commits(store: Path, stage: str = "*") -> dict[str, int]:
    """When each commit record was written, by its path in the store."""
    return {
        path.relative_to(store).as_posix(): path.stat().st_mtime_ns
        for path in store.glob(f"commits/{stage}/*/*.json")
    }


def executions(log: str) -> int:
    """How many units a run's lines say it ran."""
    return sum(int(line.split(": ")[1].split()[0]) for line in log.splitlines() if " done before, " in line)


def parsed(text: str) -> Any:
    """JSON output."""
    return json.loads(text)
