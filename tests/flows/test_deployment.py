"""The repository's Prefect deployment, deployed to a real server and run by a real process worker."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from storage.store import open_store
from tests.conftest import REPOSITORY, TINY, config_with
from tests.flows.command import write_config

PREFECT = Path(sys.executable).with_name("prefect")
DEPLOYMENT = "vitrine-nightly/nightly"
POOL = "vitrine"


def prefect(*arguments: str) -> str:
    """Runs the ``prefect`` command in the repository; its output."""
    path = f"{PREFECT.parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [str(PREFECT), "--no-prompt", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout


async def _with_client(work: Any) -> Any:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return await work(client)


@pytest.fixture(scope="module")
def deployed(prefect_api: str) -> dict[str, Any]:
    """The deployment as the server knows it."""
    prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    prefect("deploy", "--all")
    found: dict[str, Any] = json.loads(prefect("deployment", "inspect", DEPLOYMENT, "--output", "json"))
    return found


def test_the_nightly_deployment_is_there_with_its_schedule_switched_off(deployed: dict[str, Any]) -> None:
    (schedule,) = deployed["schedules"]
    assert schedule["slug"] == "nightly"
    assert schedule["active"] is False
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert schedule["schedule"]["timezone"] == "UTC"
    assert deployed["global_concurrency_limit"]["limit"] == 1
    assert deployed["work_pool_name"] == POOL
    assert deployed["entrypoint"] == "flows/deployments.py:nightly_study"
    assert deployed["parameters"] == {"config": None, "store": "vitrine-store", "overrides": [], "limit": None}


def test_a_process_worker_runs_the_deployment_to_its_end(deployed: dict[str, Any], tmp_path: Path) -> None:
    study = config_with(TINY, dataset={"images": 4}, methods=["grad_cam"], concepts={"layers": []})
    parameters = {
        "config": str(write_config(tmp_path / "tiny.yaml", study)),
        "store": str(tmp_path / "store"),
        "overrides": ["metrics=[p_deletion]"],
    }

    async def ask(client: Any) -> UUID:
        run = await client.create_flow_run_from_deployment(UUID(deployed["id"]), parameters=parameters)
        return run.id

    async def look(client: Any) -> str:
        return str((await client.read_flow_run(run_id)).state.type.value)

    run_id = asyncio.run(_with_client(ask))
    prefect("worker", "start", "--pool", POOL, "--type", "process", "--run-once")
    assert asyncio.run(_with_client(look)) == "COMPLETED"
    (run,) = open_store(tmp_path / "store").runs.all()
    assert run.state == "complete"
    assert [choice["name"] for choice in run.config["metrics"]] == ["p_deletion"]
    assert all(open_store(tmp_path / "store").done(unit, key) for unit, key in run.units().items())
