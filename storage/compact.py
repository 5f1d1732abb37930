"""Compaction: the rows of many small files in one, beside them, so that a query opens few files.

A compacted file is a copy that can be made again: it is used where every file that went into it is wanted, and is
what its record names, and is of no account otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from storage.canonical import digest_file, digest_json
from storage.commits import KEY_CHARACTERS, CommitRecord
from storage.files import publish
from storage.schema import TABLES
from storage.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from storage.store import Store

# Fewer files than this are opened as fast as one.
LEAST_FILES = 64
ROW_GROUP = 1 << 17


@dataclass(frozen=True)
class Compacted:
    """A compacted file: the digest of each commit's file that went into it, and what the file itself must be."""

    path: Path
    sources: Mapping[str, str]
    bytes: int
    sha256: str

    def is_whole(self) -> bool:
        """Whether the file has its size (a glance, not a hash)."""
        try:
            return self.path.stat().st_size == self.bytes
        except FileNotFoundError:
            return False


class CompactLog:
    """The compacted files of one store, by table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self, name: str = "*") -> Iterator[Compacted]:
        """The compacted files of a table, or of all, whose seals are whole."""
        for path in sorted(self.folder.glob(f"{name}/*.json")):
            if (body := read_sealed(path)) is not None:
                yield Compacted(path.with_suffix(".parquet"), **body)

    def cover(self, name: str, records: Iterable[CommitRecord]) -> tuple[list[Path], list[CommitRecord]]:
        """Compacted files that hold rows of these records and of no others, and the records that none covers."""
        wanted = {record.key: record for record in records}
        sources = {key: _source(record, name) for key, record in wanted.items()}
        chosen = []
        for one in self.all(name):
            fits = all(sources.get(key) == digest for key, digest in one.sources.items())
            if fits and one.is_whole():
                chosen.append(one.path)
                for key in one.sources:
                    del wanted[key], sources[key]
        return chosen, list(wanted.values())


def compact(store: Store, records: Iterable[CommitRecord]) -> None:
    """Writes one file for every table that these records wrote into many small ones, where none does yet."""
    kept = list(records)
    for name in TABLES:
        _, loose = store.compacted.cover(name, [one for one in kept if name in one.facts.get("tables", {})])
        if len(loose) >= LEAST_FILES:
            _write(store, name, loose)


def _write(store: Store, name: str, records: list[CommitRecord]) -> None:
    sources = {record.key: _source(record, name) for record in records}
    path = store.compacted.folder / name / f"{digest_json(sources)[:KEY_CHARACTERS]}.parquet"
    publish(path, lambda temporary: _merge(store, name, records, temporary))
    body = {"sources": sources, "bytes": path.stat().st_size, "sha256": digest_file(path)}
    write_sealed(path.with_suffix(".json"), body)


def _merge(store: Store, name: str, records: list[CommitRecord], target: Path) -> None:
    """All rows; memory holds one row group."""
    held: list[pa.Table] = []
    with pq.ParquetWriter(target, TABLES[name], compression="zstd", write_page_checksum=True) as writer:
        for record in records:
            held.append(store.read_table(record, name))
            if sum(one.num_rows for one in held) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP)
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=ROW_GROUP)


def _source(record: CommitRecord, name: str) -> str:
    """The digest of the file that a record wrote into a table."""
    path = record.facts["tables"][name]
    return next(one.sha256 for one in record.objects if one.path == path)
