"""Zarr arrays whose shard is the task's shard: created once, then written one whole shard at a time.

A write that is not aligned to the array's shards is refused: two writers inside one Zarr shard would each
read, change and write it back, and one of them would silently lose. A shard is put in place like any other
file, so that a reader never sees half of one; all its chunks are written, so that an all-zero map and a lost
file differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec

from storage.errors import StoreError
from storage.files import publish_bytes

INNER_CHUNK = 8
ZSTD_LEVEL = 1
ENCODERS = 2
# How the index of a shard says that a chunk is not there.
ABSENT = 2**64 - 1
METADATA = "zarr.json"
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
    attributes: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The specification as it stands in commit records."""
        shapes = {"item_shape": list(self.item_shape), "dimensions": list(self.dimensions)}
        return {**asdict(self), **shapes}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ArraySpec:
        """The specification that a commit record holds."""
        shapes = {name: tuple(document[name]) for name in ("item_shape", "dimensions")}
        return cls(**{**document, **shapes})


def metadata_of(spec: ArraySpec) -> bytes:
    """The array's zarr.json, made by zarr itself in memory; the same specification gives the same bytes."""
    return _metadata(json.dumps(spec.to_json(), sort_keys=True))


@lru_cache(maxsize=64)
def _metadata(spec_json: str) -> bytes:
    spec = ArraySpec.from_json(json.loads(spec_json))
    memory: dict[str, Any] = {}
    zarr.create_array(
        store=zarr.storage.MemoryStore(memory),
        shape=(spec.rows, *spec.item_shape),
        shards=(spec.shard_rows, *spec.item_shape),
        chunks=(_inner_rows(spec.shard_rows), *spec.item_shape),
        dtype=spec.dtype,
        # A checksum in every chunk: without it a flipped bit is read as data.
        compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
        # One file a shard, side by side: folders would each have to be made durable too.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=spec.dimensions,
        attributes=dict(spec.attributes),
    )
    return memory[METADATA].to_bytes()


def ensure_array(path: Path, spec: ArraySpec) -> None:
    """Creates the array's metadata, whole or not at all; an array that already stands must be the same.

    Its folder becomes a Zarr group, so that xarray opens all arrays of it as one data set.

    Raises:
        StoreError: another array stands at this path.
    """
    metadata, group = path / METADATA, path.parent / METADATA
    if not group.exists():
        publish_bytes(group, GROUP)
    if not metadata.exists():
        publish_bytes(metadata, metadata_of(spec))
    _refuse_other(metadata, spec)


def _refuse_other(metadata: Path, spec: ArraySpec) -> None:
    content = metadata.read_bytes()
    if content == metadata_of(spec):
        return
    found, expected = _layout(content), _layout(metadata_of(spec))
    if found != expected:
        raise StoreError(
            f"array {metadata.parent.name}: expected {expected}, got {found}; "
            "the folder is damaged or belongs to another layout: see `vitrine verify`"
        )


def _layout(content: bytes) -> str:
    """What shards side by side must agree in; a later zarr may spell the rest in other words."""
    try:
        document = json.loads(content)
        return f"shape {document['shape']} of {document['data_type']} in shards of {document['chunk_grid']}"
    except (ValueError, KeyError, TypeError):
        return "no readable metadata"


def shard_path(path: Path, spec: ArraySpec, start: int) -> Path:
    """The file of the shard that begins at a row."""
    return path / ".".join(["c", str(start // spec.shard_rows), *("0" for _ in spec.item_shape)])


def encode_shard(spec: ArraySpec, start: int, values: np.ndarray) -> Iterator[bytes]:
    """The bytes of the shard that begins at row ``start``, piece by piece, as zarr itself would write them.

    Chunks are compressed side by side while the pieces before them are written: three times as fast as through
    zarr's own pipeline, to the same bytes (Zarr v3, ``sharding_indexed``: chunks, then their index).

    Raises:
        StoreError: the rows are not exactly one shard of the array, or of another shape or type.
    """
    _refuse_unaligned(spec, start, values)
    return _pieces(spec, values)


def _refuse_unaligned(spec: ArraySpec, start: int, values: np.ndarray) -> None:
    stop = start + len(values)
    if start % spec.shard_rows or stop != min(start + spec.shard_rows, spec.rows):
        raise StoreError(
            f"array: expected rows of one whole shard of {spec.shard_rows} of {spec.rows}, got {start}..{stop}; "
            "a write inside a shard could lose another writer's rows"
        )
    if values.shape[1:] != spec.item_shape or values.dtype != np.dtype(spec.dtype):
        raise StoreError(
            f"array: expected items {spec.item_shape} of {spec.dtype}, got {values.shape[1:]} of {values.dtype}"
        )


def _pieces(spec: ArraySpec, values: np.ndarray) -> Iterator[bytes]:
    rows = _inner_rows(spec.shard_rows)
    # A chunk that lies wholly behind the last row is not there; one that lies partly behind it is filled up.
    index = np.full((spec.shard_rows // rows, 2), ABSENT, "<u8")
    position = 0
    with ThreadPoolExecutor(ENCODERS) as pool:
        chunks = (_padded(values[first : first + rows], rows) for first in range(0, len(values), rows))
        for number, piece in enumerate(pool.map(_compress, chunks)):
            index[number] = position, len(piece)
            position += len(piece)
            yield piece
    content = index.tobytes()
    yield content + google_crc32c.value(content).to_bytes(4, "little")


def _padded(chunk: np.ndarray, rows: int) -> np.ndarray:
    """A chunk of exactly so many rows, little-endian and contiguous; rows behind the array's end are zero."""
    missing = np.zeros((rows - len(chunk), *chunk.shape[1:]), chunk.dtype)
    whole = np.concatenate([chunk, missing]) if len(missing) else chunk
    return np.ascontiguousarray(whole, whole.dtype.newbyteorder("<"))


def _compress(chunk: np.ndarray) -> bytes:
    return bytes(Zstd(level=ZSTD_LEVEL, checksum=True).encode(chunk))


def read_rows(path: Path, start: int, stop: int) -> np.ndarray:
    """Rows of an array; a chunk whose checksum does not fit raises."""
    return np.asarray(open_array(path)[start:stop])


def open_array(path: Path) -> zarr.Array:
    """An array to read from."""
    return zarr.open_array(path, mode="r")


def read_attributes(path: Path) -> dict[str, Any]:
    """The array's user attributes."""
    return dict(json.loads((path / METADATA).read_bytes())["attributes"])


def _inner_rows(shard_rows: int) -> int:
    """The inner chunk: 8 rows, or the largest number up to 8 that divides the shard."""
    return next(rows for rows in range(min(INNER_CHUNK, shard_rows), 0, -1) if shard_rows % rows == 0)
