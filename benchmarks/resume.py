"""Resuming a finished run of 100 shards: seconds until "nothing to do", and stage executions (none)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import row

SHARDS = 100
CONFIG = f"""
name: resume
dataset: {{kind: demo, images: {SHARDS}}}
methods: [grad_cam]
metrics: [{{name: deletion, steps: 2}}]
run: {{shard_size: 1}}
"""


def run(device: str) -> None:
    """Runs a study of 100 shards, then the same again."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "resume.yaml"
        config.write_text(CONFIG)
        command = [sys.executable, "-m", "flows.cli", "run", str(config), "--store", f"{folder}/store"]
        first = _seconds(command)
        again = [_seconds(command) for _ in range(3)]
        plan = _seconds([*command[:3], "plan", *command[4:]])
    row(f"{SHARDS} shards", first=first[0], again=sorted(one[0] for one in again)[1], plan=plan[0])
    row("said", again=again[0][1])


def _seconds(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    said = next((line for line in done.stdout.splitlines() if "nothing to do" in line), "it ran")
    return seconds, said
