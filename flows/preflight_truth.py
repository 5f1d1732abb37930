"""Masks and boxes, looked at before any work: whether they are there, fit their images and say anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from storage.errors import SourceError
from storage.sources.decode import upright_size
from storage.sources.folder import open_file, path_of
from tasks.config import DatasetConfig, TruthConfig
from tasks.parts import mask_path
from tasks.sources import open_source
from tasks.study import Study
from tasks.truth_files import (
    BoxTable,
    boxes_refusal,
    class_numbers,
    mask_refusal,
    read_boxes,
    read_values,
    values_by_class,
)
from xai_core.errors import UsageError, nearest

# Images whose masks or boxes are compared with their size before the run; the rest are checked as they are read.
IMAGES_CHECKED = 10_000
# Masks of which at least one must hold the object.
MASKS_READ = 100


def check_truth(study: Study, names: Sequence[str]) -> None:
    """Checks the masks or boxes that maps are compared with; ``names`` are those of the classes.

    Raises:
        UsageError: naming the config key, what was expected and what was got.
    """
    config = study.config
    if config.truth.boxes is not None:
        _check_boxes(study, config.truth.boxes, names)
        return
    values_by_class(config.truth, names)
    folder = Path(str(config.truth.masks))
    check_mask_folder("truth.masks", folder, config.dataset, one_byte=True)
    _check_values(folder, config.dataset, config.truth)


def check_mask_folder(key: str, folder: Path, dataset: DatasetConfig, *, one_byte: bool = False) -> None:
    """Checks that every image of a folder has a mask of its size; ``key`` names the masks in what is told.

    Raises:
        UsageError: a mask that is missing, broken or does not fit.
    """
    if not folder.is_dir():
        raise UsageError(f"{key}: expected a folder that mirrors dataset.path, got {folder}")
    for reference, size in _sizes(dataset):
        path = mask_path(folder, reference)
        if not path.is_file():
            raise UsageError(f"{key}: expected a mask for every image, got none at {path}")
        # A broken image is set aside when it is read; its mask is not to blame.
        if size is not None:
            _check_mask(key, path, size, one_byte=one_byte)


def _check_mask(key: str, path: Path, size: tuple[int, int], *, one_byte: bool) -> None:
    try:
        with Image.open(path) as mask:
            mode, found = mask.mode, mask.size
    except OSError as error:
        raise UsageError(f"{key}: expected a mask at {path}, got something else: {error}") from None
    refusal = mask_refusal(mode if one_byte else "L", found, size)
    if refusal is not None:
        raise UsageError(f"{key}: expected {path} {refusal}")


def _sizes(dataset: DatasetConfig) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """The first images of a folder with width and height of the upright picture, None where it is broken."""
    for item in islice(open_source(dataset).items(), IMAGES_CHECKED):
        try:
            with (
                open_file(Path(str(dataset.path)) / path_of(item.reference)) as stream,
                Image.open(stream) as picture,
            ):
                size = upright_size(picture)
        except Exception:
            size = None
        yield item.reference, size


def _check_values(folder: Path, dataset: DatasetConfig, truth: TruthConfig) -> None:
    """A value that no mask has is more likely a wrong number than a set of pictures without objects."""
    held: set[int] = set()
    for reference, size in islice(_sizes(dataset), MASKS_READ):
        try:
            held.update(np.unique(read_values(folder, reference, size or (0, 0))).tolist())
        except SourceError:
            continue
    objects = truth.values_on_objects or held - {0, *truth.ignore}
    if held and not objects & held:
        expected = (
            f"values {sorted(truth.values_on_objects)}" if truth.values_on_objects else "a value on the object"
        )
        raise UsageError(
            f"truth.foreground: expected {expected} in the masks, the first {MASKS_READ} of which hold "
            f"{', '.join(map(str, sorted(held)))}: name those on the object"
        )


def _check_boxes(study: Study, path: str, names: Sequence[str]) -> None:
    table = read_boxes(path, study.truth_files)
    dataset = study.config.dataset
    if table.labels and not class_numbers(table.labels, names):
        first = min(table.labels)
        raise UsageError(
            f"truth.boxes: expected names or numbers of the model's {len(names)} classes as labels in {path}, got "
            f"{first!r}: {nearest(first, names)}"
        )
    source = open_source(dataset)
    if not any(item.reference in table.by_image for item in source.items()):
        example, got = next(source.items()).reference, next(iter(table.by_image), None)
        raise UsageError(
            f"truth.boxes: expected paths of the set's images, such as {example!r}, in {path}, got {got!r}"
        )
    if dataset.kind == "folder":
        _check_places(dataset, table)


def _check_places(dataset: DatasetConfig, table: BoxTable) -> None:
    for reference, size in _sizes(dataset):
        refusal = None if size is None else boxes_refusal(table.by_image.get(reference, ()), size)
        if refusal is not None:
            raise UsageError(f"truth.boxes: {reference}: {refusal}")
