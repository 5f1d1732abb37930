"""The file that says which number a class has and what it is called."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

from storage.errors import SourceError


def read_classes(path: Path) -> dict[str, tuple[int, str]]:
    """Label and readable name by folder name, from a CSV with a header.

    Raises:
        SourceError: no such file, or a row that is not an index from 0 and a folder name.
    """
    if not path.is_file():
        raise SourceError(f"dataset.classes: expected a CSV file, got {path}")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    return {row[1]: (int(row[0]), row[-1]) for row in rows if _is_class(path, row)}


def _is_class(path: Path, row: list[str]) -> bool:
    if row and not (len(row) > 1 and row[0].strip().isdigit()):
        raise SourceError(
            f"dataset.classes: expected rows of index, folder name and readable name in {path.name}, got {row}"
        )
    return bool(row)


def names_by_label(classes: Collection[tuple[int, str]]) -> tuple[str, ...]:
    """Readable names at their labels; a label that is not among the classes has an empty name."""
    names = [""] * (max((label for label, _ in classes), default=-1) + 1)
    for label, name in classes:
        names[label] = name
    return tuple(names)
