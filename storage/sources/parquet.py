"""Parquet with ``image: struct<bytes, path>`` and ``label``: the layout of the hubs."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SourceError
from storage.sources.base import ImageItem
from storage.sources.classes import names_by_label, read_classes

# Row groups kept decoded: a shuffled shard comes back to each of them.
CACHE_BYTES = 256 << 20


class ParquetSource:
    """Images in one Parquet file, or in all ``*.parquet`` files of a folder, in sorted order.

    ``classes`` is a CSV as folders have it (its second column is not read): it says that labels are the model's
    class numbers, and what they are called, where no hub wrote names into the file.
    """

    def __init__(self, path: Path, classes: Path | None = None) -> None:
        self._classes = classes
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise SourceError(f"dataset.path: expected a Parquet file or a folder of them, got {path}")
        self._schema, *_ = (_checked_schema(file) for file in self.files)
        self._groups: OrderedDict[tuple[str, int, int], pa.ChunkedArray] = OrderedDict()
        if not any(pq.read_metadata(file).num_rows for file in self.files):
            raise SourceError(f"dataset.path: expected rows, found none in {path}")

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels: those given, else from the file's own metadata, where a hub wrote them."""
        if self._classes is not None:
            return names_by_label((row.label, row.name) for row in read_classes(self._classes))
        try:
            features = json.loads(self._schema.metadata[b"huggingface"])["info"]["features"]
            return tuple(features["label"]["names"])
        except (KeyError, TypeError, ValueError):
            return None

    def items(self) -> Iterator[ImageItem]:
        """Every row in file order; only labels are read."""
        for number, path in enumerate(self.files):
            stat = path.stat()
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                columns = ["label"] if "label" in self._schema.names else []
                table = file.read_row_group(group, columns=columns)
                labels = table["label"].to_pylist() if columns else [None] * table.num_rows
                for row, label in enumerate(labels):
                    yield ImageItem(
                        reference=f"{path.name}#{group}/{row}",
                        fingerprint=f"{number}:{stat.st_size}:{stat.st_mtime_ns}",
                        label=label,
                        label_name=self._name(label),
                    )

    def read(self, reference: str) -> bytes:
        """The bytes in one row; its row group stays in memory for the next."""
        name, _, place = reference.rpartition("#")
        group, row = (int(number) for number in place.split("/"))
        try:
            content = self._group(self.files[0].with_name(name), group)[row].as_py()
        except (pa.ArrowException, IndexError) as error:
            raise SourceError(f"expected a readable row {reference}: {error}") from error
        if content is None:
            raise SourceError("expected an encoded picture, got null")
        return content

    def _group(self, path: Path, group: int) -> pa.ChunkedArray:
        # The time is part of the name: a worker that lives long must not serve a file that was replaced.
        place = (path.name, path.stat().st_mtime_ns, group)
        if place not in self._groups:
            table = pq.ParquetFile(path).read_row_group(group, columns=["image.bytes"])
            self._groups[place] = table["image"].combine_chunks().field("bytes")
            while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place]

    def _name(self, label: int | None) -> str | None:
        if label is None:
            return None
        names = self.class_names or ()
        known = 0 <= label < len(names)
        if self._classes is not None and not (known and names[label]):
            raise SourceError(
                f"dataset.classes: expected a row for every label, got none for {label} in {self._classes.name}"
            )
        return names[label] if known else str(label)


def _checked_schema(path: Path) -> pa.Schema:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"dataset.path: {path.name} is not Parquet: {error}") from error
    types = dict(zip(schema.names, schema.types, strict=True))
    image, label = types.get("image"), types.get("label", pa.int64())
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise SourceError(
            f"dataset.path: expected the columns image: struct<bytes, path> and label in {path.name}, "
            f"got {schema.names}"
        )
    if not pa.types.is_integer(label):
        raise SourceError(f"dataset.path: expected label: integers in {path.name}, got {label}")
    return schema
