"""Image folder: one sub-folder per class."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from storage.errors import SourceError
from storage.sources.base import ImageItem

ENCODED = "percent-encoded:"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


class FolderSource:
    """Images in ``root/<class>/...``; labels are the classes' positions in sorted order.

    ``classes`` is a CSV with a header and the columns index, folder name and, if there is a third, readable
    name: it gives the labels instead, for data whose folders are a subset of the model's classes.
    """

    def __init__(self, root: Path, classes: Path | None = None) -> None:
        if not root.is_dir():
            raise SourceError(f"dataset.path: expected a folder with one folder per class, got {root}")
        self.root = root
        self._classes = classes
        if next(self.items(), None) is None:
            raise SourceError(
                f"dataset.path: expected images ({', '.join(sorted(SUFFIXES))}) in one folder per class, "
                f"found none in {root}"
            )

    @cached_property
    def _folders(self) -> dict[str, tuple[int, str]]:
        """Label and readable name of every class folder."""
        present = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if self._classes is None:
            return {name: (label, _readable(name)) for label, name in enumerate(present)}
        known = read_classes(self._classes)
        unknown = [name for name in present if name not in known]
        if unknown:
            raise SourceError(
                f"dataset.classes: expected a row for every class folder, got none for {unknown[:3]} "
                f"({len(unknown)} in all)"
            )
        return {name: known[name] for name in present}

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Readable names by label; labels without a folder have an empty name."""
        names = [""] * (max(label for label, _ in self._folders.values()) + 1)
        for label, name in self._folders.values():
            names[label] = name
        return tuple(names)

    def items(self) -> Iterator[ImageItem]:
        """Every image, class by class, in sorted order."""
        for folder, (label, name) in self._folders.items():
            for path, stat in _files(self.root / folder):
                yield ImageItem(
                    reference=reference_of(path.relative_to(self.root).as_posix()),
                    fingerprint=f"{stat.st_size}:{stat.st_mtime_ns}",
                    label=label,
                    label_name=name,
                )

    def read(self, reference: str) -> bytes:
        """The bytes of the file at this relative path."""
        return (self.root / path_of(reference)).read_bytes()


def reference_of(path: str) -> str:
    """A relative path as text that any table can hold: itself, or percent-encoded where it is not UTF-8."""
    if _readable(path) == path and not path.startswith(ENCODED):
        return path
    return ENCODED + quote_from_bytes(os.fsencode(path), safe="/ ")


def path_of(reference: str) -> str:
    """The relative path that :func:`reference_of` spelled."""
    if not reference.startswith(ENCODED):
        return reference
    return os.fsdecode(unquote_to_bytes(reference.removeprefix(ENCODED)))


def _readable(name: str) -> str:
    """A file name with a sign of doubt in place of every byte that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


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


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield Path(entry.path), entry.stat()
