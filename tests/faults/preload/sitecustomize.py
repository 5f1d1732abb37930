"""Watches what a real Python process does with files, and can hold or end the process at a named moment.

Put this folder first on PYTHONPATH: every Python process that inherits the environment is watched, but none where
the variables below are not set. ``install`` does the same for a forked child.

A moment is what a path is about to be used for:

    write    about to be opened for writing (a temporary file: nothing of it is there)
    sync     about to be opened to be synced (a temporary file: written, not synced)
    rename   about to be put in place (written and synced)
    settle   in place, its folder not synced yet
    lock     a lock on it was just taken
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time

LOG = "VITRINE_TEST_LOG"
LOGGED = "VITRINE_TEST_LOGGED"
DEATHS = "VITRINE_TEST_DEATHS"
HOLDS = "VITRINE_TEST_HOLDS"

ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class Moments:
    """Translates audit events into moments; each thread's renames are followed by its own syncs."""

    def __init__(self):
        self._last = threading.local()

    def of(self, event, arguments):
        """The moment and the path of an event, or None."""
        if event == "open":
            return self._opened(*arguments)
        if event == "os.rename":
            self._last.renamed = target = _text(arguments[1])
            return "rename", target
        if event == "os.truncate" and isinstance(arguments[0], int):
            return "lock", os.readlink(f"/proc/self/fd/{arguments[0]}")
        return None

    def _opened(self, name, mode, flags):
        path = _text(name)
        if flags & ACCESS != os.O_RDONLY:
            return "write", path
        # Only os.open gives no mode.
        if mode is not None:
            return None
        renamed = getattr(self._last, "renamed", "")
        if renamed and path == os.path.dirname(renamed):
            return "settle", renamed
        return "sync", path


class Journal:
    """Appends a line "pid moment path" for every moment that matches."""

    def __init__(self, path, pattern):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pattern = re.compile(pattern)

    def __call__(self, moment, path):
        if self._pattern.search(f"{moment} {path}"):
            # One write to a file opened for appending: lines of several processes do not mix.
            os.write(self._descriptor, f"{os.getpid()} {moment} {path}\n".encode())


class Death:
    """Ends the process at the n-th time that a moment comes to a matching path.

    Args:
        moment, path: which moment, and a pattern for its path.
        marker: file that is written, and synced, right before; a number is added for every further death.
        nth: which occurrence, counted in each process.
        times: how many processes die of it at most.
        how: SIGKILL, or SIGSEGV by a read of address 0.
    """

    def __init__(self, moment, path, marker, nth=1, times=1, how="SIGKILL"):
        self._moment, self._path = moment, re.compile(path)
        self._marker, self._times, self._how = marker, times, how
        self._left = nth

    def __call__(self, moment, path):
        if moment != self._moment or not self._path.search(path):
            return
        self._left -= 1
        if self._left <= 0 and self._fire(moment, path):
            _die(self._how)

    def _fire(self, moment, path):
        for number in range(self._times):
            name = f"{self._marker}.{number}" if number else self._marker
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                os.write(descriptor, f"{os.getpid()} {moment} {path}\n".encode())
                os.fsync(descriptor)
                os.close(descriptor)
                return True
        return False


class Hold:
    """Holds the process at every moment that matches, until a file exists; ``marker`` says that it is held."""

    def __init__(self, moment, path, marker, until):
        self._moment, self._path = moment, re.compile(path)
        self._marker, self._until = marker, until

    def __call__(self, moment, path):
        if moment != self._moment or not self._path.search(path):
            return
        os.close(os.open(self._marker, os.O_WRONLY | os.O_CREAT, 0o644))
        while not os.path.exists(self._until):
            time.sleep(0.02)


def _die(how):
    if how == "SIGSEGV":
        import ctypes

        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, how))
    threading.Event().wait()


def _text(path):
    if isinstance(path, int):
        return ""
    return os.fsdecode(os.fspath(path))


def install(settings):
    """Starts to watch this process, as the settings say; without any nothing is done."""
    listeners = []
    if settings.get(LOG):
        listeners.append(Journal(settings[LOG], settings[LOGGED]))
    if settings.get(DEATHS):
        listeners.extend(Death(**one) for one in json.loads(settings[DEATHS]))
    if settings.get(HOLDS):
        listeners.extend(Hold(**one) for one in json.loads(settings[HOLDS]))
    if not listeners:
        return
    moments = Moments()
    inside = threading.local()

    def hook(event, arguments):
        if event not in ("open", "os.rename", "os.truncate") or getattr(inside, "now", False):
            return
        inside.now = True
        try:
            found = moments.of(event, arguments)
            if found is not None:
                for listener in listeners:
                    listener(*found)
        finally:
            inside.now = False

    sys.addaudithook(hook)


def _run_the_next_sitecustomize():
    """Only the first of the path is imported by Python itself."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    found = PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        found.loader.exec_module(module_from_spec(found))


if __name__ == "sitecustomize":
    _run_the_next_sitecustomize()
    install(os.environ)
