"""The file that says which number a class has and what it is called."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from storage.errors import SourceError


@dataclass(frozen=True)
class ClassRow:
    """A class: its label, the folder that holds it, and its readable name."""

    label: int
    folder: str
    name: str


def read_classes(path: Path) -> list[ClassRow]:
    """The classes in a CSV with a header, row by row; without a third column a class is called as its folder.

    Raises:
        SourceError: no such file, or a row that is not an index from 0 and a folder name.
    """
    if not path.is_file():
        raise SourceError(f"dataset.classes: expected a CSV file, got {path}")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    return [ClassRow(int(row[0]), row[1], row[-1]) for row in rows if _is_class(path, row)]


def _is_class(path: Path, row: list[str]) -> bool:
    if row and not (len(row) > 1 and row[0].strip().isdigit()):
        raise SourceError(
            f"dataset.classes: expected rows of index, folder name and readable name in {path.name}, got {row}"
        )
    return bool(row)


def names_by_label(classes: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Readable names at their labels; a label that is not among the classes has an empty name."""
    known = dict(classes)
    return tuple(known.get(label, "") for label in range(max(known, default=-1) + 1))
