"""Units that are to be tried again though they are done.

A further attempt is an ingredient of the unit's key, so that whatever rests on the unit follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from storage.commits import KEY_CHARACTERS, CommitRecord, key_of
from storage.sealed import read_sealed, write_sealed

ATTEMPT = "attempt"


class AttemptLog:
    """The attempts of one store beyond the first, one small file for each unit's first key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> Mapping[str, int]:
        """Number of the attempt that is due, by the beginning of the unit's first key."""
        found = {path.stem: read_sealed(path) for path in self.folder.glob("*.json")}
        return {key: int(number) for key, number in found.items() if number is not None}

    def again(self, record: CommitRecord) -> None:
        """Asks for another attempt of a committed unit."""
        first = {name: value for name, value in record.ingredients.items() if name != ATTEMPT}
        path = self.folder / f"{key_of(first)[:KEY_CHARACTERS]}.json"
        write_sealed(path, attempt_of(record.ingredients) + 1)


def attempt_of(ingredients: Mapping[str, object]) -> int:
    """The number of a unit's attempt, 1 for the first."""
    return int(str(ingredients.get(ATTEMPT, 1)))
