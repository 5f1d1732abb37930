"""Image folder: one sub-folder per class."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote_from_bytes, unquote_to_bytes

from storage.errors import SourceError
from storage.sources.base import ImageItem
from storage.sources.classes import names_by_label, read_classes

ENCODED = "percent-encoded:"
# Larger than any picture of as many pixels as are decoded; a file without end would fill the memory.
MAX_BYTES = 1 << 30

# What can stand in a folder under a picture's name and is no file.
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


class FolderSource:
    """Images in ``root/<class>/...``; labels are the classes' positions in sorted order.

    An image is what is named like one; whether it can be read is found out when it is. Names that begin with a dot
    are hidden: such files and folders (``._0.jpg``, ``.ipynb_checkpoints``) are no part of the set. Links are
    followed, but not back into a folder that they stand in.

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
        present = [Path(path).name for path, found in _entries(self.root) if self._is_class(found)]
        if self._classes is None:
            return {name: (label, _readable(name)) for label, name in enumerate(present)}
        known = {row.folder: (row.label, row.name) for row in read_classes(self._classes)}
        unknown = [name for name in present if name not in known]
        if unknown:
            raise SourceError(
                f"dataset.classes: expected a row for every class folder, got none for {unknown[:3]} "
                f"({len(unknown)} in all)"
            )
        return {name: known[name] for name in present}

    def _is_class(self, found: os.stat_result | None) -> bool:
        return found is not None and _is_folder(found) and _identity(found) != _identity(os.stat(self.root))

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Readable names by label; labels without a folder have an empty name."""
        return names_by_label(self._folders.values())

    def items(self) -> Iterator[ImageItem]:
        """Every image, class by class, in sorted order."""
        for folder, (label, name) in self._folders.items():
            for path, found in _files(self.root / folder, (_identity(os.stat(self.root)),)):
                yield ImageItem(
                    reference=reference_of(path.relative_to(self.root).as_posix()),
                    fingerprint="unknown" if found is None else f"{found.st_size}:{found.st_mtime_ns}",
                    label=label,
                    label_name=name,
                )

    def read(self, reference: str) -> bytes:
        """The bytes of the file at this relative path.

        Raises:
            SourceError: no file stands there but something else, or one of more than ``MAX_BYTES``.
            OSError: nothing does, or it may not be read.
        """
        with open_file(self.root / path_of(reference)) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise SourceError(f"expected a picture of at most {MAX_BYTES} bytes, got {size}")
            return stream.read()


def open_file(path: Path) -> BinaryIO:
    """A regular file, opened; anything else is refused instead of waited for, as a pipe would be.

    Raises:
        SourceError: what stands there is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
    raise SourceError(f"expected a file, got {kind}")


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


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Images in and below a folder, with what is known of each; ``above`` are the folders that it stands in."""
    here = (*above, _identity(os.stat(folder)))
    if here[-1] in above:
        return
    for path, found in _entries(folder):
        if _is_folder(found):
            yield from _files(Path(path), here)
        elif Path(path).suffix.lower() in SUFFIXES:
            yield Path(path), found


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """What stands in a folder and is not hidden, by name; None is known of a link that leads nowhere.

    Raises:
        SourceError: the folder may not be listed: nobody knows what would be missing.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(
            f"dataset.path: expected a folder that can be listed, got {error.strerror} for {folder}; "
            "make it readable, or move it out of the data set"
        ) from error
    for entry in found:
        if not entry.name.startswith("."):
            yield entry.path, _stat(entry)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _is_folder(found: os.stat_result | None) -> bool:
    return found is not None and stat.S_ISDIR(found.st_mode)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
