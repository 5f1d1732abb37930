"""A published file is whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.files import FOREIGN_SECONDS, TEMPORARY, publish, publish_bytes, remove_leftovers


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_file_is_there_whole_and_alone(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "deep" / "file", b"content")
    assert (tmp_path / "deep" / "file").read_bytes() == b"content"
    assert names(tmp_path / "deep") == ["file"]


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def write_half(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        publish(tmp_path / "file", write_half)
    assert names(tmp_path) == []


def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path / "file", lambda temporary: temporary.write_bytes(b"x" * (1 // 0)))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_file_appears_only_after_the_writer_is_done(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"new")
        assert names(tmp_path) == [temporary.name]
        assert temporary.name.startswith(TEMPORARY)

    publish(tmp_path / "file", write)


def test_a_name_as_long_as_the_system_allows_can_be_published(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    publish_bytes(path, b"1")
    assert path.read_bytes() == b"1"


def test_leftovers_of_dead_writers_are_removed_at_once_and_those_of_living_ones_spared(tmp_path: Path) -> None:
    write = "import sys; from pathlib import Path; from storage.files import temporary_name as name\n"
    write += "Path(sys.argv[1], name('x')).write_bytes(b'half'); print('written', flush=True); sys.stdin.read()"
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "kept").write_bytes(b"1")
    command = [sys.executable, "-c", write, str(folder)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"written\n"
    assert remove_leftovers(tmp_path) == 0
    writer.kill()
    writer.communicate()
    assert remove_leftovers(tmp_path) == 1
    assert names(folder) == ["kept"]


def test_leftovers_of_other_machines_are_removed_after_a_day(tmp_path: Path) -> None:
    stale, fresh = tmp_path / f"{TEMPORARY}00000000-1-aa-x", tmp_path / f"{TEMPORARY}00000000-1-bb-x"
    folder = tmp_path / f"{TEMPORARY}00000000-1-cc.sort"
    folder.mkdir()
    (folder / "part").write_bytes(b"1")
    for path in (stale, fresh):
        path.write_bytes(b"1")
    long_ago = time.time() - FOREIGN_SECONDS - 60
    for path in (stale, folder):
        os.utime(path, (long_ago, long_ago))
    assert remove_leftovers(tmp_path) == 2
    assert names(tmp_path) == [fresh.name]


def test_every_new_folder_and_file_is_made_durable_in_order(tmp_path: Path) -> None:
    """Watched from outside: which descriptors a real process syncs, by name, and when it renames."""
    child = """
import os, sys
from pathlib import Path
real_sync, real_replace = os.fsync, os.replace
def fsync(descriptor):
    print("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
    real_sync(descriptor)
def replace(source, target):
    print("rename", target)
    real_replace(source, target)
os.fsync, os.replace = fsync, replace
from storage.files import publish_bytes
publish_bytes(Path(sys.argv[1], "a", "b", "file"), b"content")
"""
    printed = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    events = [line.split(" ", 1) for line in printed.splitlines()]
    assert [kind for kind, _ in events] == ["sync", "sync", "sync", "rename", "sync"]
    places = [Path(path) for _, path in events]
    assert places[:2] == [tmp_path, tmp_path / "a"]
    assert places[2].parent == tmp_path / "a" / "b"
    assert places[2].name.startswith(TEMPORARY)
    assert places[3:] == [tmp_path / "a" / "b" / "file", tmp_path / "a" / "b"]
