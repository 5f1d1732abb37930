"""How far a training is, told through a small file: it may run on another machine than whoever watches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.commits import KEY_CHARACTERS
from storage.files import make_folder, temporary_name

# So often at most: readers look about as often.
SECONDS = 0.5
_SUFFIX = "progress"


@dataclass(frozen=True)
class Word:
    """So many of so many ``units`` (``pictures`` decoded, then ``steps``) are done, with a remark for people."""

    units: str
    done: int
    of: int
    remark: str = ""


class Telling:
    """Tells one unit's progress; a file that cannot be written is left, since no result hangs on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = -SECONDS

    def tell(self, word: Word) -> None:
        """Puts the word in place, unless the last one is very young and something follows."""
        moment = time.monotonic()
        if moment - self._said < SECONDS and word.done < word.of:
            return
        self._said = moment
        # Its own name is that of a temporary file: it needs no other to be put in place whole.
        beside = self._path.with_name(f"{self._path.name}~")
        with suppress(OSError):
            beside.write_text(json.dumps(asdict(word)))
            os.replace(beside, self._path)


@contextmanager
def telling(folder: Path, key: str) -> Iterator[Telling]:
    """Tells of the unit with a key in a store's folder ``work`` while the block lasts."""
    make_folder(folder)
    path = folder / temporary_name(f"{key[:KEY_CHARACTERS]}.{_SUFFIX}")
    try:
        yield Telling(path)
    finally:
        path.unlink(missing_ok=True)


def last_word(folder: Path, key: str) -> Word | None:
    """What was told last of the unit with a key, or None where nothing is told."""
    files = sorted(folder.glob(f".tmp-*-{key[:KEY_CHARACTERS]}.{_SUFFIX}"), key=_time)
    try:
        return Word(**json.loads(files[-1].read_text()))
    except (IndexError, OSError, ValueError, TypeError):
        return None


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
