"""The listing: every image of a source, in the order in which a study takes them.

The order is a seeded, class-stratified shuffle, so that any prefix of it is a fair sample. It is sorted on
disk by DuckDB: memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage.canonical import digest_file
from storage.files import make_folder, publish, temporary_name
from storage.sealed import read_sealed, write_sealed
from storage.sources.base import ImageItem, ImageSource

BATCH = 16_384
SORT_MEMORY = "512MB"

SCHEMA = pa.schema(
    [
        ("reference", pa.string()),
        ("fingerprint", pa.string()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("shuffle", pa.float64()),
    ]
)

# Each class spreads its images evenly over [0, 1), each one jittered inside its own step: a prefix then
# holds every class in proportion: to within two images where classes are of equal size.
STRATIFIED = """
select row_number() over (order by place, shuffle, reference) - 1 as image_id, * exclude (place, shuffle)
from (select *, (row_number() over (partition by label order by shuffle, reference) - 1 + shuffle)
             / count(*) over (partition by label) as place from raw)
order by image_id
"""

IN_ORDER = """
select row_number() over () - 1 as image_id, * exclude (shuffle) from raw
"""


@dataclass(frozen=True)
class Listing:
    """An ordered listing on disk: its file, its digest and its length."""

    path: Path
    digest: str
    rows: int

    def slice(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows ``start`` to ``stop``: image_id, reference, fingerprint, label, label_name."""
        rows: list[dict[str, Any]] = []
        file = pq.ParquetFile(self.path)
        first = 0
        for group in range(file.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                rows += file.read_row_group(group).slice(low, high - low).to_pylist()
            first += length
        return rows


def build_listing(source: ImageSource, folder: Path, order_seed: int | None) -> Listing:
    """Lists a source into ``folder``, in stratified shuffled order (``order_seed`` None: the source's own).

    An unchanged source is listed again (that is how a change is noticed) but not sorted again.
    """
    make_folder(folder)
    raw = folder / temporary_name("raw.parquet")
    try:
        digest, rows = _write_raw(source, raw, order_seed)
        path = folder / f"{digest[:24]}.parquet"
        if not path.exists() or read_sealed(seal_of(path)) is None:
            publish(path, lambda temporary: _sort(raw, temporary, order_seed))
            write_sealed(seal_of(path), {"sha256": digest_file(path), "bytes": path.stat().st_size})
        return Listing(path, digest, rows)
    finally:
        raw.unlink(missing_ok=True)


def seal_of(path: Path) -> Path:
    """Where the digest of a listing's file stands."""
    return path.with_suffix(".json")


def _write_raw(source: ImageSource, path: Path, order_seed: int | None) -> tuple[str, int]:
    digest = hashlib.sha256(f"order:{order_seed};".encode())
    rows = 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for batch in _batches(source.items()):
            for item in batch:
                digest.update(repr((item.reference, item.fingerprint, item.label)).encode("utf-8", "replace"))
            writer.write_table(_to_table(batch, order_seed))
            rows += len(batch)
    return digest.hexdigest(), rows


def _batches(items: Iterator[ImageItem]) -> Iterator[list[ImageItem]]:
    batch: list[ImageItem] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _to_table(batch: list[ImageItem], order_seed: int | None) -> pa.Table:
    return pa.table(
        {
            "reference": [item.reference for item in batch],
            "fingerprint": [item.fingerprint for item in batch],
            "label": [item.label for item in batch],
            "label_name": [item.label_name for item in batch],
            "shuffle": [_uniform(order_seed, item.reference) for item in batch],
        },
        schema=SCHEMA,
    )


def _uniform(seed: int | None, reference: str) -> float:
    """A number in [0, 1) from the seed and the reference alone: other images do not change it."""
    content = f"{seed}:{reference}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big") / 2**48


def _sort(raw: Path, target: Path, order_seed: int | None) -> None:
    connection = duckdb.connect(":memory:")
    try:
        connection.execute(f"set memory_limit = '{SORT_MEMORY}'")
        connection.execute("set temp_directory = ?", [str(raw.with_suffix(".sort"))])
        connection.execute(f"create view raw as select * from read_parquet('{_quoted(raw)}')")
        order = IN_ORDER if order_seed is None else STRATIFIED
        connection.execute(f"copy ({order}) to '{_quoted(target)}' (format parquet, row_group_size {BATCH})")
    finally:
        connection.close()


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
