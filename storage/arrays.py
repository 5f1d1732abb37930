"""Zarr arrays whose shard is the task's shard: created once, then written one whole shard at a time.

A write that is not aligned to the array's shards is refused: two writers inside one Zarr shard would each
read, change and write it back, and one of them would silently lose.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from storage.errors import StoreError
from storage.files import publish_bytes, sync

INNER_CHUNK = 8
GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()


@dataclass(frozen=True)
class ArraySpec:
    """What an array is before anything is written: per-row shape, type, names and how it is sharded.

    ``rows`` is the length of the first axis, ``shard_rows`` how many of them one task writes.
    """

    rows: int
    shard_rows: int
    item_shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    attributes: dict[str, Any]


def ensure_array(path: Path, spec: ArraySpec) -> None:
    """Creates the array's metadata, whole or not at all; an array that already stands must be the same.

    Its folder becomes a Zarr group, so that xarray opens all arrays of it as one data set.

    Raises:
        StoreError: another array stands at this path.
    """
    metadata, group = path / "zarr.json", path.parent / "zarr.json"
    if not group.exists():
        publish_bytes(group, GROUP)
    if not metadata.exists():
        publish_bytes(metadata, _metadata(spec))
    _refuse_other(metadata, spec)


def _metadata(spec: ArraySpec) -> bytes:
    """The array's zarr.json, made by zarr itself in memory."""
    memory: dict[str, Any] = {}
    zarr.create_array(
        store=zarr.storage.MemoryStore(memory),
        shape=(spec.rows, *spec.item_shape),
        shards=(spec.shard_rows, *spec.item_shape),
        chunks=(_inner_rows(spec.shard_rows), *spec.item_shape),
        dtype=spec.dtype,
        # A checksum in every chunk: without it a flipped bit is read as data.
        compressors=ZstdCodec(level=1, checksum=True),
        dimension_names=spec.dimensions,
        attributes=spec.attributes,
    )
    return memory["zarr.json"].to_bytes()


def _refuse_other(metadata: Path, spec: ArraySpec) -> None:
    found = json.loads(metadata.read_bytes())
    expected = json.loads(_metadata(spec))
    if (found["shape"], found["data_type"], found["chunk_grid"]) != (
        expected["shape"],
        expected["data_type"],
        expected["chunk_grid"],
    ):
        raise StoreError(
            f"array {metadata.parent.name}: expected shape {expected['shape']} of {expected['data_type']}, "
            f"got {found['shape']} of {found['data_type']}; the folder belongs to another layout: remove it"
        )


def write_shard(path: Path, start: int, values: np.ndarray) -> Path:
    """Writes one whole shard and makes it durable; returns the file that holds it.

    Raises:
        StoreError: the rows are not exactly one shard of the array.
    """
    # Empty chunks are written too: otherwise an all-zero map and a lost file look the same.
    array = zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True})
    shard_rows = (array.shards or array.chunks)[0]
    stop = start + len(values)
    if start % shard_rows or stop != min(start + shard_rows, array.shape[0]):
        raise StoreError(
            f"array {path.name}: expected rows of one whole shard of {shard_rows}, got {start}..{stop}; "
            "a write inside a shard could lose another writer's rows"
        )
    if values.shape[1:] != array.shape[1:]:
        raise StoreError(f"array {path.name}: expected items {array.shape[1:]}, got {values.shape[1:]}")
    array[start:stop] = values
    file = path.joinpath("c", str(start // shard_rows), *("0" for _ in array.shape[1:]))
    sync(file)
    sync(file.parent)
    return file


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Rows of an array; a chunk whose checksum does not fit raises."""
    return np.asarray(zarr.open_array(path, mode="r")[start:stop])


def read_attributes(path: Path) -> dict[str, Any]:
    """The array's user attributes."""
    return dict(json.loads((path / "zarr.json").read_bytes())["attributes"])


def _inner_rows(shard_rows: int) -> int:
    """The inner chunk: 8 rows, or the largest number up to 8 that divides the shard."""
    return next(rows for rows in range(min(INNER_CHUNK, shard_rows), 0, -1) if shard_rows % rows == 0)
