"""One writer per store, across processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import StoreLockedError
from storage.lock import exclusive

HOLD = """
import sys
from pathlib import Path
from storage.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "locks" / "writer.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_it(holder: subprocess.Popen, tmp_path: Path) -> None:
    with (
        pytest.raises(StoreLockedError, match=rf"written by process {holder.pid} on .+ since 20"),
        exclusive(tmp_path / "locks" / "writer.lock"),
    ):
        pytest.fail("two writers")
    with pytest.raises(StoreLockedError, match=str(holder.pid)), exclusive(tmp_path / "locks" / "writer.lock"):
        pytest.fail("the refusal forgot the holder")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_no_lock(holder: subprocess.Popen, tmp_path: Path, end: signal.Signals) -> None:
    holder.send_signal(end)
    holder.wait()
    with exclusive(tmp_path / "locks" / "writer.lock"):
        pass


def test_the_lock_is_free_after_its_block_even_when_that_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock"):
        pass


def test_children_of_the_holder_do_not_keep_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with exclusive(tmp_path / "lock"):
            pass
    finally:
        child.communicate()
