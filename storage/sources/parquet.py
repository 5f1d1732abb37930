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

# Row groups kept decoded: a shuffled shard comes back to each of them.
CACHE_BYTES = 256 << 20


class ParquetSource:
    """Images in one Parquet file, or in all ``*.parquet`` files of a folder, in sorted order."""

    def __init__(self, path: Path) -> None:
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise SourceError(f"dataset.path: expected a Parquet file or a folder of them, got {path}")
        self._schema = self._checked_schema()
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()
        if not any(pq.read_metadata(file).num_rows for file in self.files):
            raise SourceError(f"dataset.path: expected rows, found none in {path}")

    def _checked_schema(self) -> pa.Schema:
        try:
            schema = pq.read_schema(self.files[0])
        except pa.ArrowInvalid as error:
            raise SourceError(f"dataset.path: {self.files[0].name} is not Parquet: {error}") from error
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise SourceError(
                f"dataset.path: expected the columns image: struct<bytes, path> and label, got {schema.names}"
            )
        return schema

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels from the file's own metadata, where a hub wrote them."""
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
        name, _, place = reference.partition("#")
        group, row = (int(number) for number in place.split("/"))
        number = next(index for index, path in enumerate(self.files) if path.name == name)
        content = self._group(number, group)[row].as_py()
        if content is None:
            raise SourceError("expected an encoded picture, got null")
        return content

    def _group(self, number: int, group: int) -> pa.ChunkedArray:
        if (number, group) not in self._groups:
            table = pq.ParquetFile(self.files[number]).read_row_group(group, columns=["image.bytes"])
            self._groups[number, group] = table["image"].combine_chunks().field("bytes")
            while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((number, group))
        return self._groups[number, group]

    def _name(self, label: int | None) -> str | None:
        if label is None:
            return None
        return self.class_names[label] if self.class_names else str(label)
