"""What mask files and tables of boxes say of a picture's object, in the picture's own pixels."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from storage.errors import SourceError
from storage.sources.decode import open_picture
from storage.sources.folder import open_file
from tasks.config import TruthConfig
from tasks.parts import mask_path
from xai_core.errors import UsageError, nearest
from xai_core.metrics.truth import INSIDE, OUTSIDE, UNKNOWN

NO_BOX = "no box is known of the image"
NO_BOX_OF_CLASS = "no box is known of the target class"
NO_KNOWN_VALUE = "no value of the mask is known"
NO_VALUE_OF_CLASS = "no mask value is known for the target class"

# Modes of one byte a pixel, whose bytes are the values.
MASK_MODES = ("1", "L", "P")
COLUMNS = ("path", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Told:
    """A mask uint8 ``[H, W]`` of 1, 0 and 255 (unknown); ``reason`` says why it is unknown throughout."""

    mask: np.ndarray
    reason: str | None = None


# What is told of a picture, by its path, its width and height, and its target class.
Teller = Callable[[str, tuple[int, int], int], Told]


@dataclass(frozen=True)
class Box:
    """A box in pixels of the upright picture, ends excluded; ``label`` is empty where it is any class's."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str = ""

    def inside(self, size: tuple[int, int]) -> np.ndarray:
        """The pixels whose centres lie in the box, bool ``[H, W]`` of a picture's width and height."""
        columns, rows = (np.arange(length) + 0.5 for length in size)
        return np.outer((self.y0 <= rows) & (rows < self.y1), (self.x0 <= columns) & (columns < self.x1))


@dataclass(frozen=True)
class BoxTable:
    """The boxes of every image that has some, and all their labels."""

    by_image: Mapping[str, tuple[Box, ...]]
    labels: frozenset[str]


def teller(truth: TruthConfig, names: Sequence[str], digest: str | None) -> Teller:
    """Reads what is known of pictures, given the names of the model's classes and the files' digest.

    Raises:
        UsageError: ``foreground`` names a class that is none, or ``boxes`` is no such table.
    """
    if truth.boxes is not None:
        table = read_boxes(truth.boxes, digest)
        return partial(_of_boxes, table.by_image, class_numbers(table.labels, names))
    folder = Path(str(truth.masks))
    return partial(_of_mask, folder, values_by_class(truth, names), frozenset(truth.ignore))


def values_by_class(truth: TruthConfig, names: Sequence[str]) -> Mapping[int, frozenset[int]] | frozenset[int]:
    """The mask values on the object: by class, or one set for all, empty where it is all but 0 and ``ignore``.

    Raises:
        UsageError: a class that is none of the model's, or one that is named twice.
    """
    if not isinstance(truth.foreground, Mapping):
        return truth.values_on_objects
    numbers = class_numbers(truth.foreground, names)
    unknown = [name for name in truth.foreground if name not in numbers]
    if unknown:
        two = "two classes have that name, so give its number"
        raise UsageError(
            f"truth.foreground: expected names or numbers of the model's {len(names)} classes, got "
            f"{', '.join(map(repr, unknown[:3]))}: {two if unknown[0] in names else nearest(unknown[0], names)}"
        )
    twice = [name for name, number in numbers.items() if list(numbers.values()).count(number) > 1]
    if twice:
        raise UsageError(f"truth.foreground: expected each class once, got {' and '.join(map(repr, twice[:2]))}")
    return {numbers[name]: frozenset(values) for name, values in truth.foreground.items()}


def class_numbers(labels: Iterable[str], names: Sequence[str]) -> dict[str, int]:
    """The classes that labels stand for, by name or number; left out are those that stand for none, or for two."""
    count = Counter(names)
    by_name = {name: number for number, name in enumerate(names) if count[name] == 1}
    by_number = {str(number): number for number in range(len(names))}
    known = {**by_number, **by_name}
    return {label: known[label] for label in labels if label in known}


def read_values(folder: Path, image: str, size: tuple[int, int]) -> np.ndarray:
    """The values ``[H, W]`` of an image's mask, one byte a pixel.

    Raises:
        SourceError: there is no such file, or none of one byte a pixel, or it is of another size than the image.
    """
    path = mask_path(folder, image)
    try:
        with open_file(path) as stream:
            mask = open_picture(stream.read())
    except (OSError, SourceError) as error:
        raise SourceError(f"truth.masks: expected a readable mask at {path}: {error}") from error
    refusal = mask_refusal(mask.mode, mask.size, size)
    if refusal is not None:
        raise SourceError(f"truth.masks: expected {path.name} {refusal}")
    return np.asarray(mask).astype(np.uint8)


def mask_refusal(mode: str, found: tuple[int, int], expected: tuple[int, int]) -> str | None:
    """What is wrong with a mask of this mode and size, or None."""
    if mode not in MASK_MODES:
        return f"with one byte a pixel (mode {', '.join(MASK_MODES)}), got mode {mode}: convert it"
    if found != expected:
        return f"of size {expected[0]} x {expected[1]} like its image, got {found[0]} x {found[1]}"
    return None


def _of_mask(
    folder: Path,
    on_object: Mapping[int, frozenset[int]] | frozenset[int],
    ignore: frozenset[int],
    image: str,
    size: tuple[int, int],
    target: int,
) -> Told:
    values = read_values(folder, image, size)
    chosen = on_object if isinstance(on_object, frozenset) else on_object.get(target)
    if chosen is None:
        return _nothing(size, NO_VALUE_OF_CLASS)
    named = chosen if isinstance(on_object, frozenset) else frozenset().union(*on_object.values())
    if named and not np.isin(values, [0, *named, *ignore]).any():
        return _nothing(size, NO_KNOWN_VALUE)
    inside = np.isin(values, list(chosen)) if chosen else values != 0
    mask = np.where(inside, INSIDE, OUTSIDE)
    return Told(np.where(np.isin(values, list(ignore)), UNKNOWN, mask).astype(np.uint8))


def _of_boxes(
    boxes: Mapping[str, Sequence[Box]],
    numbers: Mapping[str, int],
    image: str,
    size: tuple[int, int],
    target: int,
) -> Told:
    known = boxes.get(image, ())
    if not known:
        return _nothing(size, NO_BOX)
    refusal = boxes_refusal(known, size)
    if refusal is not None:
        raise SourceError(f"truth.boxes: {refusal}")
    chosen = [box for box in known if not box.label or numbers.get(box.label) == target]
    if not chosen:
        return _nothing(size, NO_BOX_OF_CLASS)
    inside = np.any([box.inside(size) for box in chosen], axis=0)
    return Told(np.where(inside, INSIDE, OUTSIDE).astype(np.uint8))


def boxes_refusal(boxes: Iterable[Box], size: tuple[int, int]) -> str | None:
    """What is wrong with the boxes of a picture of this width and height, or None; one may reach past its edge."""
    width, height = size
    for box in boxes:
        if not (box.x0 < width and box.y0 < height and box.x1 > 0 and box.y1 > 0):
            corners = f"{box.x0:g}, {box.y0:g} to {box.x1:g}, {box.y1:g}"
            return f"expected boxes in pixels of the picture of {width} x {height}, got {corners}"
    return None


def _nothing(size: tuple[int, int], reason: str) -> Told:
    return Told(np.full(size[::-1], UNKNOWN, np.uint8), reason)


@lru_cache(maxsize=1)
def read_boxes(path: str, digest: str | None) -> BoxTable:
    """The boxes of a CSV by image, read once for a digest.

    Raises:
        UsageError: no such file, missing columns, or a row that is no box; the message says which.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UsageError(
                    f"truth.boxes: expected the columns {', '.join(COLUMNS)} and, optionally, label in {path}, "
                    f"got none named {', '.join(missing)}"
                )
            found: dict[str, list[Box]] = {}
            for row in rows:
                found.setdefault(row["path"], []).append(_box(row, rows.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"truth.boxes: expected a CSV file at {path}, {error}") from None
    labels = frozenset(box.label for boxes in found.values() for box in boxes if box.label)
    return BoxTable({image: tuple(boxes) for image, boxes in found.items()}, labels)


def _box(row: Mapping[str, str | None], line: int) -> Box:
    corners = [row[name] for name in COLUMNS[1:]]
    try:
        x0, y0, x1, y1 = (float(str(corner)) for corner in corners)
    except ValueError:
        x0, y0, x1, y1 = (math.nan,) * 4
    if not (math.isfinite(x0 + y0 + x1 + y1) and x0 < x1 and y0 < y1):
        raise UsageError(f"truth.boxes: expected numbers x0 < x1 and y0 < y1 in line {line}, got {corners}")
    return Box(x0, y0, x1, y1, (row.get("label") or "").strip())
