"""Decoded pictures in a file of the store's folder ``work``, so that memory does not grow with their number."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from storage.files import make_folder, temporary_name


class PictureFile:
    """Uint8 pictures ``[N, 3, H, W]``: appended one by one, then picked by lists of rows.

    Rows are read, not mapped: pages of a mapping count as the process's own, and a cluster ends workers that
    seem to hold too much.
    """

    def __init__(self, descriptor: int, size: tuple[int, int]) -> None:
        self._descriptor = descriptor
        self.shape = (3, *size)
        self._row_bytes = int(np.prod(self.shape))
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, picture: np.ndarray) -> None:
        """Adds a picture ``[3, H, W]`` as the last row."""
        if picture.shape != self.shape or picture.dtype != np.uint8:
            raise ValueError(f"expected uint8 {self.shape}, got {picture.dtype} {picture.shape}")
        content = np.ascontiguousarray(picture).data.cast("B")
        place = self._rows * self._row_bytes
        while len(content):
            written = os.pwrite(self._descriptor, content, place)
            content, place = content[written:], place + written
        self._rows += 1

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        """Some rows ``[n, 3, H, W]``, in their order.

        Raises:
            OSError: the file is shorter than it was written.
        """
        found = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in enumerate(rows):
            self._read(found[place].data.cast("B"), row * self._row_bytes)
        return found

    def _read(self, target: memoryview, place: int) -> None:
        while len(target):
            count = os.preadv(self._descriptor, [target], place)
            if not count:
                raise OSError("the file of decoded pictures is shorter than it was written")
            target, place = target[count:], place + count


class Rows:
    """Some rows of pictures, as pictures of their own."""

    def __init__(self, pictures: PictureFile, rows: Sequence[int]) -> None:
        self._pictures, self._rows = pictures, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        return self._pictures[[self._rows[row] for row in rows]]


@contextmanager
def picture_file(folder: Path, size: tuple[int, int]) -> Iterator[PictureFile]:
    """A new file for pictures of a height and width, removed after the block.

    What a killed process leaves is removed like all unpublished files; its pictures are decoded again.
    """
    make_folder(folder)
    path = folder / temporary_name("pictures")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield PictureFile(descriptor, size)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
