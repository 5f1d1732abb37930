"""Writing files so that a reader sees either all of a file or none of it, after any crash."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".tmp-"
FRESH_SECONDS = 60.0


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable: a rename is only safe once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(root: Path) -> int:
    """Removes what killed writers left unpublished below a folder; returns how many files and folders.

    What was touched in the last minute may belong to a writer at work and is spared.
    """
    old = time.time() - FRESH_SECONDS
    stale = [path for path in root.rglob(f"{TEMPORARY}*") if path.stat().st_mtime < old]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return len(stale)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary neighbour, then puts it in place: fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}"[:250])
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def publish_bytes(path: Path, content: bytes) -> None:
    """Writes bytes to a path whole or not at all."""
    publish(path, lambda temporary: _write(temporary, content))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
