"""A disk without room and a limit on file sizes: a clear error, nothing half done, the rest once there is room."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from storage.digest import results_digest
from storage.store import open_store
from storage.verify import verify_store
from tests.conftest import TINY, config_with
from tests.faults.processes import SINGLE
from tests.flows.command import VITRINE

# Large enough for the server's database, too small for the report.
CONFIG = config_with(TINY, concepts={"layers": []}, methods=["grad_cam"], metrics=["p_deletion"])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory, of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def vitrine(
    *arguments: object, api: str | None = None, limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.run(
        [str(VITRINE), *map(str, arguments)],
        env={**kept, **SINGLE, **({"PREFECT_API_URL": api} if api else {})},
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_nothing_is_half_done(root: Path) -> None:
    store = open_store(root)
    found = verify_store(store)
    assert found.damage == ()
    (run,) = store.runs.all()
    assert run.state == "failed"
    committed = {record.unit.stage for _, record in store.records()}
    assert committed == {"manifest", "predict", "parts", "attribute", "metrics"}


def test_a_full_disk_ends_the_run_clearly_and_the_next_completes(
    small_disk: Path, config: Path, tmp_path: Path, prefect_api: str
) -> None:
    store = small_disk / "store"
    room = store.parent / "ballast"
    room.write_bytes(bytes(5 << 20))
    failed = vitrine("run", config, "--store", store, api=prefect_api)
    assert failed.returncode == 1, failed.stderr
    assert "No space left on device" in failed.stderr
    assert "report" in failed.stderr
    assert "make room" in failed.stderr
    assert "resume with: vitrine run" in failed.stderr
    assert_nothing_is_half_done(store)
    room.unlink()
    assert vitrine("run", config, "--store", store, api=prefect_api).returncode == 0
    assert_same_as_a_clean_run(store, config, tmp_path, prefect_api)


def test_a_limit_on_file_sizes_ends_the_run_clearly_and_the_next_completes(
    config: Path, tmp_path: Path, prefect_api: str
) -> None:
    store = tmp_path / "store"
    failed = vitrine("run", config, "--store", store, api=prefect_api, limit=2 << 20)
    assert failed.returncode == 1, failed.stderr
    assert "File too large" in failed.stderr
    assert "report.html" in failed.stderr
    assert "resume with: vitrine run" in failed.stderr
    assert_nothing_is_half_done(store)
    assert vitrine("run", config, "--store", store, api=prefect_api).returncode == 0
    assert_same_as_a_clean_run(store, config, tmp_path, prefect_api)


def test_a_disk_that_the_servers_own_database_fills(small_disk: Path, config: Path, tmp_path: Path) -> None:
    store = small_disk / "store"
    room = small_disk / "ballast"
    room.write_bytes(bytes(7 << 20))
    failed = vitrine("run", config, "--store", store)
    assert failed.returncode == 1
    assert "make room" in failed.stderr
    assert "Traceback" not in failed.stderr
    room.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert vitrine("run", config, "--store", store).returncode == 0
    assert verify_store(open_store(store)).damage == ()


def assert_same_as_a_clean_run(root: Path, config: Path, tmp_path: Path, api: str) -> None:
    clean = tmp_path / "clean"
    assert vitrine("run", config, "--store", clean, api=api).returncode == 0
    digests = set()
    for folder in (root, clean):
        store = open_store(folder)
        (run,) = store.runs.all()
        assert run.state == "complete"
        assert verify_store(store).damage == ()
        digests.add(results_digest(store, run.run_id))
    assert len(digests) == 1
