"""The store: tensors in Zarr, rows in Parquet, and commit records that say what of it is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from storage import arrays
from storage.canonical import digest_file, digest_json
from storage.commits import KEY_CHARACTERS, CommitLog, CommitRecord, StoredObject, Unit, slug
from storage.errors import NoStoreError, StoreError
from storage.files import publish, publish_bytes
from storage.runs import RunLog
from storage.schema import FORMAT_VERSION, TABLES

FORMAT_FILE = "vitrine.json"


class Store:
    """A folder that holds the results of any number of runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits = CommitLog(root / "commits")
        self.runs = RunLog(root / "runs")

    @property
    def lock_path(self) -> Path:
        """The lock that a writer of this store holds."""
        return self.root / "locks" / "writer.lock"

    def done(self, unit: Unit, key: str) -> CommitRecord | None:
        """The record of a unit under this key if it is committed and every object has its size, else None."""
        record = self.commits.read(unit, key)
        return record if record is not None and not self.damage(record) else None

    def damage(self, record: CommitRecord) -> list[str]:
        """Objects of a record that are missing or have another size (a glance, not a full hash)."""
        found = []
        for one in record.objects:
            try:
                size = (self.root / one.path).stat().st_size
            except FileNotFoundError:
                found.append(f"{one.path}: missing")
                continue
            if size != one.bytes:
                found.append(f"{one.path}: expected {one.bytes} bytes, got {size}")
        return found

    def begin(self, unit: Unit, key: str, ingredients: Mapping[str, Any]) -> Commit:
        """Starts a unit: write through the commit, then ``finish`` it."""
        return Commit(self, unit, key, ingredients)

    def array_path(self, stage: str, variant: str, series: str, name: str) -> Path:
        """Where an array of a stage's variant stands; ``series`` separates incompatible settings."""
        return self.root / "arrays" / stage / f"{slug(variant)}-{series[:12]}" / name

    def read_array(self, record: CommitRecord, name: str) -> np.ndarray:
        """The rows of an array that a record committed."""
        place = record.facts["arrays"][name]
        return arrays.read_rows(self.root / place["path"], place["start"], place["stop"])

    def array_attributes(self, record: CommitRecord, name: str) -> dict[str, Any]:
        """The attributes of an array that a record wrote into."""
        return arrays.read_attributes(self.root / record.facts["arrays"][name]["path"])

    def read_table(self, record: CommitRecord, name: str) -> pa.Table:
        """The rows of a table that a record committed; empty when it wrote none."""
        path = record.facts.get("tables", {}).get(name)
        if path is None:
            return TABLES[name].empty_table()
        return pq.read_table(self.root / path, schema=TABLES[name], partitioning=None)

    def read_file(self, record: CommitRecord, name: str) -> Path:
        """The path of a file that a record committed."""
        return self.root / record.facts["files"][name]

    def dataset(self, name: str, records: Iterable[CommitRecord]) -> pads.Dataset:
        """A table's committed files as one dataset with a column ``commit`` that names each row's key.

        Built from records and never from a glob, so that readers see whole shards only.
        """
        schema = TABLES[name].append(pa.field("commit", pa.string()))
        written = [(r.facts["tables"][name], r.key) for r in records if name in r.facts.get("tables", {})]
        if not written:
            return pads.dataset(schema.empty_table())
        return pads.FileSystemDataset.from_paths(
            [path for path, _ in written],
            schema=schema,
            format=pads.ParquetFileFormat(),
            filesystem=pa.fs.SubTreeFileSystem(str(self.root), pa.fs.LocalFileSystem()),
            partitions=[pads.field("commit") == key for _, key in written],
        )

    def records(self, run_ids: Iterable[str] | None = None) -> Iterator[tuple[str, CommitRecord]]:
        """Run id and record of everything committed, for some runs or for all."""
        chosen = None if run_ids is None else set(run_ids)
        for run in self.runs.all():
            if chosen is None or run.run_id in chosen:
                for unit, key in run.units().items():
                    if (record := self.done(unit, key)) is not None:
                        yield run.run_id, record


class Commit:
    """The writing of one unit: objects first, each durable, the record last."""

    def __init__(self, store: Store, unit: Unit, key: str, ingredients: Mapping[str, Any]) -> None:
        self.store = store
        self.unit = unit
        self.key = key
        self._ingredients = ingredients
        self._objects: list[StoredObject] = []
        self._places: dict[str, dict[str, Any]] = {"arrays": {}, "tables": {}, "files": {}}

    def table(self, name: str, table: pa.Table) -> None:
        """Writes this unit's rows of a table; without rows nothing is written."""
        if table.schema != TABLES[name]:
            raise StoreError(f"table {name}: expected {TABLES[name]}, got {table.schema}")
        if table.num_rows == 0:
            return
        stem = f"{self.unit.stage}-{self.unit.shard:07d}-{self.key[:KEY_CHARACTERS]}"
        path = self.store.root / "tables" / name / f"{stem}.parquet"
        publish(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
        self._note("tables", name, path)

    def array(self, name: str, series: str, start: int, values: np.ndarray, spec: arrays.ArraySpec) -> None:
        """Writes this unit's shard of an array, rows ``start`` onwards."""
        path = self.store.array_path(self.unit.stage, self.unit.variant, series, name)
        arrays.ensure_array(path, spec)
        file = arrays.write_shard(path, start, values)
        self._places["arrays"][name] = {
            "path": self._relative(path),
            "start": start,
            "stop": start + len(values),
        }
        self._objects.append(self._describe(file))

    def file(self, name: str, suffix: str, content: bytes) -> None:
        """Writes one file of this unit (a dictionary, a report)."""
        stem = f"{slug(self.unit.variant)}-{self.key[:KEY_CHARACTERS]}"
        path = self.store.root / "files" / self.unit.stage / f"{stem}-{name}{suffix}"
        publish_bytes(path, content)
        self._note("files", name, path)

    def finish(self, facts: Mapping[str, Any]) -> CommitRecord:
        """Writes the record; from here on the unit is done.

        An object that another, unfinished attempt overwrote in the meantime would make the record a lie,
        so the record holds the digests taken right after each write.
        """
        record = CommitRecord(
            self.key, self.unit, self._ingredients, tuple(self._objects), {**facts, **self._places}
        )
        self.store.commits.write(record)
        return record

    def _note(self, kind: str, name: str, path: Path) -> None:
        self._places[kind][name] = self._relative(path)
        self._objects.append(self._describe(path))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.store.root).as_posix()

    def _describe(self, path: Path) -> StoredObject:
        return StoredObject(self._relative(path), path.stat().st_size, digest_file(path))


def open_store(root: Path | str, *, create: bool = False) -> Store:
    """Opens the store in a folder.

    Raises:
        NoStoreError: no store there (unless ``create``), or a folder that holds other things.
        StoreError: a store of a newer format.
    """
    root = Path(root)
    marker = root / FORMAT_FILE
    if not marker.exists():
        if not create:
            raise NoStoreError(
                f"--store: expected a store in {root}, found none: run `vitrine run --store {root}` first"
            )
        _refuse_foreign(root)
        publish_bytes(marker, json.dumps({"format": FORMAT_VERSION}).encode())
    found = json.loads(marker.read_bytes())["format"]
    if found > FORMAT_VERSION:
        raise StoreError(
            f"store {root} has format {found}, this version reads up to {FORMAT_VERSION}: upgrade vitrine"
        )
    return Store(root)


def _refuse_foreign(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise NoStoreError(
            f"--store: expected a store, a new folder or an empty one, got {root}, which holds other things"
        )


def series_of(*ingredients: Any) -> str:
    """The digest that names an array's series: everything that must agree for shards to stand side by side."""
    return digest_json(list(ingredients))
