"""A published file is whole or not there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from storage.files import TEMPORARY, publish, publish_bytes, remove_leftovers


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


def test_leftovers_of_killed_writers_are_removed_and_fresh_files_spared(tmp_path: Path) -> None:
    stale, fresh, kept = (tmp_path / "a" / name for name in (f"{TEMPORARY}1-x", f"{TEMPORARY}2-y", "x"))
    folder = tmp_path / f"{TEMPORARY}3.sort"
    folder.mkdir()
    stale.parent.mkdir()
    for path in (stale, fresh, kept):
        path.write_bytes(b"1")
    an_hour_ago = time.time() - 3600
    for path in (stale, kept, folder):
        os.utime(path, (an_hour_ago, an_hour_ago))
    assert remove_leftovers(tmp_path) == 2
    assert names(tmp_path / "a") == [fresh.name, "x"]
    assert names(tmp_path) == ["a"]
