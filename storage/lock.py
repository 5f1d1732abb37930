"""Locks held by the kernel: a killed holder leaves none behind.

A process that runs a study shares the store's lock and holds its run's; whoever writes a unit holds the lock of
its key. What changes a store as a whole (repair, garbage collection) holds the store's lock alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from storage.errors import StoreLockedError
from storage.files import make_folder


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Holds a file lock for the block; the file is gone afterwards.

    Raises:
        StoreLockedError: at once, naming the holder's process, host and start, when someone else holds it.
    """
    descriptor = _open_locked(path, what)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
        yield
    finally:
        # While it is still held: whoever waits for this file finds that its name stands for another one.
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


@contextmanager
def shared(path: Path, what: str) -> Iterator[None]:
    """Holds a lock that others may share, but none may hold alone, for the block.

    Raises:
        StoreLockedError: at once, when someone holds it alone.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try(descriptor, fcntl.LOCK_SH):
            raise StoreLockedError(_refusal(what, _read_holder(descriptor)))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path, what: str, holders: Path) -> Iterator[None]:
    """Holds a lock that others share, alone, for the block; ``holders`` is where the sharers' own locks are.

    Raises:
        StoreLockedError: at once, naming those who hold it or write a unit.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        free = _try(descriptor, fcntl.LOCK_EX)
        # Workers may outlive their driver by a moment: they hold the locks of their units.
        living = [who for lock in sorted(holders.rglob("*.lock")) if lock != path and (who := holder_of(lock))]
        if not free or living:
            raise StoreLockedError(_refusal(what, living[0] if living else _read_holder(descriptor)))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder_of(path: Path) -> str | None:
    """Who holds the lock at a path, or None where it is free."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if _try(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path, what: str) -> int:
    """A locked descriptor of the file that the path names now, not of one that its last holder removed."""
    make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try(descriptor, fcntl.LOCK_EX):
            who = _read_holder(descriptor)
            os.close(descriptor)
            raise StoreLockedError(_refusal(what, who))
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _refusal(what: str, who: str) -> str:
    return f"{what} is being written by {who}; wait for it to end, stop it, or use another --store"
