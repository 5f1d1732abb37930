"""Locks across processes: who holds one, and that it goes with its holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from storage.errors import StoreLockedError
from storage.lock import alone, exclusive, holder_of, shared

HOLD = """
import sys
from pathlib import Path
from storage.lock import exclusive
with exclusive(Path(sys.argv[1]), "store s"):
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
        pytest.raises(StoreLockedError, match=rf"store s is being written by process {holder.pid} on .+ since 20"),
        exclusive(tmp_path / "locks" / "writer.lock", "store s"),
    ):
        pytest.fail("two writers")
    with (
        pytest.raises(StoreLockedError, match=str(holder.pid)),
        exclusive(tmp_path / "locks" / "writer.lock", "store s"),
    ):
        pytest.fail("the refusal forgot the holder")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_no_lock(holder: subprocess.Popen, tmp_path: Path, end: signal.Signals) -> None:
    holder.send_signal(end)
    holder.wait()
    with exclusive(tmp_path / "locks" / "writer.lock", "store s"):
        pass


def test_the_lock_is_free_after_its_block_even_when_that_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock", "store s"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock", "store s"):
        pass


def test_children_of_the_holder_do_not_keep_the_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", "store s"):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with exclusive(tmp_path / "lock", "store s"):
            pass
    finally:
        child.communicate()


def test_a_free_lock_leaves_no_file_and_names_no_holder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", "unit u"):
        assert str(os.getpid()) in holder_of(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []
    assert holder_of(tmp_path / "lock") is None


CONTEND = """
import sys
from pathlib import Path
from storage.errors import StoreLockedError
from storage.lock import exclusive
inside, counter = 0, Path(sys.argv[2])
while inside < 200:
    try:
        with exclusive(Path(sys.argv[1]), "unit u"):
            inside += 1
            counter.write_text(str(int(counter.read_text()) + 1))
    except StoreLockedError:
        pass
"""


def test_no_two_processes_are_ever_inside_though_the_file_goes_each_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", CONTEND, str(tmp_path / "lock"), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert counter.read_text() == "600"


def test_sharers_do_not_keep_each_other_out_but_keep_out_who_wants_to_be_alone(tmp_path: Path) -> None:
    store, runs = tmp_path / "locks" / "store.lock", tmp_path / "locks"
    with (
        shared(store, "store s"),
        shared(store, "store s"),
        exclusive(runs / "run-a.lock", "run a"),
        pytest.raises(StoreLockedError, match=rf"store s .+ process {os.getpid()} on"),
    ):
        enter(alone(store, "store s", runs))
    with alone(store, "store s", runs):
        with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} on .+ since"):
            enter(shared(store, "store s"))
        with pytest.raises(StoreLockedError):
            enter(alone(store, "store s", runs))


def test_a_unit_that_is_still_being_written_keeps_out_who_wants_to_be_alone(tmp_path: Path) -> None:
    unit = tmp_path / "locks" / "units" / "u.lock"
    with exclusive(unit, "unit u"), pytest.raises(StoreLockedError, match=rf"process {os.getpid()}"):
        enter(alone(tmp_path / "locks" / "store.lock", "store s", tmp_path / "locks"))


def enter(context: AbstractContextManager[None]) -> None:
    with context:
        pass
