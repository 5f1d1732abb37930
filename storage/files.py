"""Writing files so that a reader sees either all of a file or none of it, after any crash."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path

TEMPORARY = ".tmp-"
NAMED = re.compile(rf"{re.escape(TEMPORARY)}(?P<home>[0-9a-f]{{8}})-(?P<pid>\d+)-")
LONGEST_NAME = 250
# Whether a writer on another machine still lives cannot be seen from here.
FOREIGN_SECONDS = 24 * 3600.0


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable: a rename is only safe once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder with its parents, each entry durable: a synced file in a lost folder is lost."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def temporary_name(name: str) -> str:
    """A name for an unpublished file that says which process of which machine writes it."""
    return f"{TEMPORARY}{_home()}-{os.getpid()}-{secrets.token_hex(4)}-{name}"[:LONGEST_NAME]


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary neighbour, then puts it in place: fsync, rename, fsync of the folder."""
    make_folder(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk does not say what it had no room for.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def publish_bytes(path: Path, content: bytes) -> None:
    """Writes bytes to a path whole or not at all."""
    publish(path, lambda temporary: temporary.write_bytes(content))


def remove_durably(path: Path) -> None:
    """Removes a file, if it is there, so that it does not come back after a power loss."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync(path.parent)


def leftovers(root: Path) -> Iterator[Path]:
    """What killed writers left unpublished below a folder.

    A living writer's file is never named: not that of a process of this machine that runs, and of other
    machines only what has not been touched for a day.
    """
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if name.startswith(TEMPORARY) and _is_abandoned(path):
                yield path


def remove_leftovers(root: Path) -> int:
    """Removes what killed writers left unpublished below a folder; returns how many files and folders."""
    stale = list(leftovers(root))
    for path in stale:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return len(stale)


def _is_abandoned(path: Path) -> bool:
    named = NAMED.match(path.name)
    if named and named["home"] == _home():
        return not _is_alive(int(named["pid"]))
    try:
        return path.stat().st_mtime < time.time() - FOREIGN_SECONDS
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _home() -> str:
    """Where process numbers mean the same: this host since it started, and this container of it."""
    facts = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", _text), ("/proc/self/ns/pid", os.readlink)):
        try:
            facts.append(read(path))
        except OSError:  # Not Linux.
            facts.append("")
    return blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def _text(path: str) -> str:
    return Path(path).read_text()
