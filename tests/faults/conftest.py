"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.processes import FULL, Warm

# Minutes of processes that are killed, starved and restarted: `make faults` alone runs these.
collect_ignore = (
    []
    if FULL
    else [
        "test_disk_full.py",
        "test_inputs.py",
        "test_kill_points.py",
        "test_kills.py",
        "test_mutations.py",
        "test_prefect_server.py",
        "test_readers.py",
        "test_two_runs.py",
        "test_workers.py",
    ]
)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that forks runs of a study."""
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()
