"""The store: tensors in Zarr, rows in Parquet, and commit records that say what of it is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from storage import arrays, lock
from storage.attempts import AttemptLog
from storage.canonical import digest_bytes, digest_json
from storage.commits import KEY_CHARACTERS, CommitLog, CommitRecord, StoredObject, Unit, slug
from storage.compact import CompactLog
from storage.errors import NoStoreError, StoreError, StoreLockedError
from storage.files import publish, publish_bytes
from storage.results import Results, StoredImage
from storage.runs import RunLog
from storage.schema import FORMAT_VERSION, READ_SINCE, TABLES, UNREPEATABLE_TABLES

if TYPE_CHECKING:
    import xarray
    import zarr

FORMAT_FILE = "vitrine.json"
# Without checksums a flipped bit of a Parquet page is read as data.
PARQUET = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)


class Store:
    """A folder that holds the results of any number of runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits = CommitLog(root / "commits")
        self.runs = RunLog(root / "runs")
        self.attempts = AttemptLog(root / "attempts")
        self.compacted = CompactLog(root / "compact")

    @contextmanager
    def running(self, run_id: str) -> Iterator[None]:
        """Holds a run for the block: others may run in this store meanwhile, but not this one.

        Raises:
            StoreLockedError: the run goes on elsewhere, or the store is being repaired or cleaned.
        """
        with (
            lock.shared(self._lock("store"), f"store {self.root}"),
            lock.exclusive(self._lock(f"run-{run_id}"), f"run {run_id}"),
        ):
            yield

    def is_running(self, run_id: str) -> bool:
        """Whether a process holds a run at this moment; a killed one leaves its record as it was."""
        return lock.holder_of(self._lock(f"run-{run_id}")) is not None

    def maintenance(self) -> AbstractContextManager[None]:
        """Holds the whole store for the block, to repair or clean it.

        Raises:
            StoreLockedError: a run goes on in it.
        """
        return lock.alone(self._lock("store"), f"store {self.root}", self.root / "locks")

    def writing(self, unit: Unit, key: str) -> AbstractContextManager[None]:
        """Holds a unit's key for the block: it has one writer at a time.

        Raises:
            StoreLockedError: another process writes it.
        """
        return lock.exclusive(self.root / "locks" / "units" / f"{key[:KEY_CHARACTERS]}.lock", f"unit {unit}")

    @contextmanager
    def own_folder(self, name: str) -> Iterator[Path]:
        """A folder of the store that this process alone uses for the block: ``name``, or with a number added."""
        with ExitStack() as held:
            for number in count():
                own = f"{name}-{number}" if number else name
                with suppress(StoreLockedError):
                    held.enter_context(lock.exclusive(self._lock(own), f"folder {own}"))
                    break
            yield self.root / own

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def done(self, unit: Unit, key: str) -> CommitRecord | None:
        """The record of a unit under this key if it is committed and every object has its size, else None."""
        record = self.commits.read(unit, key)
        return record if record is not None and not self.damage(record) else None

    def damage(self, record: CommitRecord) -> list[str]:
        """Objects of a record that are missing or have another size (a glance, not a full hash)."""
        found = []
        for one in record.objects:
            try:
                size = os.stat(f"{self.root}/{one.path}").st_size
            except FileNotFoundError:
                found.append(f"{one.path}: missing")
                continue
            if size != one.bytes:
                found.append(f"{one.path}: expected {one.bytes} bytes, got {size}")
        return found

    def begin(self, unit: Unit, key: str, ingredients: Mapping[str, Any]) -> Commit:
        """Starts a unit: write through the commit, then ``finish`` it. Hold its key for as long.

        A record that stands under this key, of objects that were damaged since, is dropped: otherwise it
        could vouch for half of what is written now.
        """
        self.commits.drop(unit, key)
        return Commit(self, unit, key, ingredients)

    def array_path(self, stage: str, variant: str, series: str, name: str) -> Path:
        """Where an array of a stage's variant stands; ``series`` separates incompatible settings."""
        return self.root / "arrays" / stage / f"{slug(variant)}-{series[:12]}" / name

    def read_array(self, record: CommitRecord, name: str) -> np.ndarray:
        """The rows of an array that a record committed.

        Raises:
            StoreError: its metadata is damaged; zarr raises where a chunk does not fit its checksum.
        """
        place = record.facts["arrays"][name]
        self._read_checked(record, f"{place['path']}/{arrays.METADATA}")
        return arrays.read_rows(self.root / place["path"], place["start"], place["stop"])

    def array_attributes(self, record: CommitRecord, name: str) -> dict[str, Any]:
        """The attributes of an array that a record wrote into."""
        return arrays.read_attributes(self.root / record.facts["arrays"][name]["path"])

    def read_table(self, record: CommitRecord, name: str) -> pa.Table:
        """The rows of a table that a record committed; empty when it wrote none.

        Raises:
            StoreError: the file is not what was committed.
        """
        path = record.facts.get("tables", {}).get(name)
        if path is None:
            return TABLES[name].empty_table()
        content = pa.BufferReader(self._read_checked(record, path))
        return pq.read_table(content, schema=TABLES[name])

    def _read_checked(self, record: CommitRecord, path: str) -> bytes:
        """The bytes of a committed object, compared with their digest: what is computed next rests on them."""
        content = (self.root / path).read_bytes()
        expected = next((one.sha256 for one in record.objects if one.path == path), None)
        if expected is not None and digest_bytes(content) != expected:
            raise StoreError(
                f"{path}: expected the bytes that {record.unit} committed, got others: "
                "`vitrine verify --repair`, then run again"
            )
        return content

    def read_file(self, record: CommitRecord, name: str) -> Path:
        """The path of a file that a record committed."""
        return self.root / record.facts["files"][name]

    def files(self, name: str, records: Iterable[CommitRecord]) -> list[str]:
        """The files that hold a table's rows of these records, and no others; paths relative to the store.

        Taken from records and never from a glob, so that readers see whole shards only. Rows that stand in a
        compacted file are read from there.
        """
        written = [record for record in records if name in record.facts.get("tables", {})]
        merged, loose = self.compacted.cover(name, written)
        return [
            *(path.relative_to(self.root).as_posix() for path in merged),
            *(record.facts["tables"][name] for record in loose),
        ]

    def dataset(self, name: str, records: Iterable[CommitRecord]) -> pads.Dataset:
        """A table's committed rows as one dataset."""
        paths = self.files(name, records)
        if not paths:
            return pads.dataset(TABLES[name].empty_table())
        return pads.FileSystemDataset.from_paths(paths, TABLES[name], PARQUET, self.filesystem)

    @property
    def filesystem(self) -> pa.fs.FileSystem:
        """The store's folder as Arrow sees it."""
        return pa.fs.SubTreeFileSystem(str(self.root), pa.fs.LocalFileSystem())

    def results(self, run: str | None = None) -> Results:
        """What is committed, of one run or of all, to read and to ask.

        Raises:
            StoreError: no such run in the store.
        """
        if run is not None and self.runs.read(run) is None:
            known = ", ".join(one.run_id for one in self.runs.all()) or "none"
            raise StoreError(f"expected a run of store {self.root}, got {run!r}; its runs: {known}")
        return Results(self, tuple(self.records(None if run is None else [run])))

    def table(self, name: str, run: str | None = None) -> pa.Table:
        """A table or view, of one run or of all; see :meth:`Results.table`."""
        return self.results(run).table(name)

    def array(self, name: str, run: str | None = None) -> zarr.Array:
        """An array of a run, by default of the one updated last; see :meth:`Results.array`."""
        return self.results(run or self._latest()).array(name)

    def xarray(self, name: str, run: str | None = None) -> xarray.DataArray:
        """The committed rows of an array, by default of the run updated last; see :meth:`Results.xarray`."""
        return self.results(run or self._latest()).xarray(name)

    def images(self, run: str | None = None) -> Iterator[StoredImage]:
        """The images of a run, by default of the one updated last; see :meth:`Results.images`."""
        return self.results(run or self._latest()).images()

    def sql(self, text: str, run: str | None = None, **limits: Any) -> pa.Table:
        """The rows of a query, over one run or all, in the locked sandbox; see :func:`storage.sql.query`."""
        from storage.sql import query

        return query(self, text, run_ids=None if run is None else [run], **limits)

    def _latest(self) -> str:
        latest = self.runs.latest()
        if latest is None:
            raise StoreError(
                f"expected a store with a run, {self.root} has none: `vitrine run --store {self.root}`"
            )
        return latest.run_id

    def records(self, run_ids: Iterable[str] | None = None) -> Iterator[tuple[str, CommitRecord]]:
        """Run id and record of everything committed, for some runs or for all."""
        chosen = None if run_ids is None else set(run_ids)
        seen: dict[str, CommitRecord | None] = {}
        for run in self.runs.all():
            if chosen is None or run.run_id in chosen:
                for unit, key in run.units().items():
                    if key not in seen:
                        seen[key] = self.done(unit, key)
                    if (record := seen[key]) is not None:
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
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self._note("tables", name, path, sink.getvalue(), repeatable=name not in UNREPEATABLE_TABLES)

    def array(
        self,
        name: str,
        series: str,
        start: int,
        values: np.ndarray,
        spec: arrays.ArraySpec,
        *,
        image: int | None = None,
    ) -> None:
        """Writes this unit's shard of an array, rows ``start`` onwards.

        ``image`` is the id of the first row's image where that is not the row itself.
        """
        path = self.store.array_path(self.unit.stage, self.unit.variant, series, name)
        pieces = arrays.encode_shard(spec, start, values)
        arrays.ensure_array(path, spec)
        shard = arrays.shard_path(path, spec, start)
        self._supersede(shard)
        self._put(shard, pieces)
        self._objects.append(self._describe(path / arrays.METADATA))
        self._places["arrays"][name] = {
            "path": self._relative(path),
            "start": start,
            "stop": start + len(values),
            "image": start if image is None else image,
            "spec": spec.to_json(),
        }

    def file(self, name: str, suffix: str, content: bytes, *, repeatable: bool = True) -> None:
        """Writes one file of this unit (a dictionary, a report); not ``repeatable`` if it tells times."""
        stem = f"{slug(self.unit.variant)}-{self.key[:KEY_CHARACTERS]}"
        path = self.store.root / "files" / self.unit.stage / f"{stem}-{name}{suffix}"
        self._note("files", name, path, content, repeatable=repeatable)

    def finish(self, facts: Mapping[str, Any]) -> CommitRecord:
        """Writes the record; from here on the unit is done.

        The record holds the digests of the bytes that were handed over, not of what the disk then had.
        """
        record = CommitRecord(
            self.key, self.unit, self._ingredients, tuple(self._objects), {**facts, **self._places}
        )
        self.store.commits.write(record)
        return record

    def _supersede(self, shard: Path) -> None:
        """Drops a record under another key that vouches for a shard whose rows are about to be replaced.

        That comes to pass where images changed under an unchanged listing.
        """
        older = self.store.commits.of_unit(self.unit) if shard.exists() else []
        for record in older:
            if any(one.path == self._relative(shard) for one in record.objects):
                self.store.commits.drop(record.unit, record.key)

    def _note(self, kind: str, name: str, path: Path, content: Any, *, repeatable: bool) -> None:
        self._put(path, [content], repeatable=repeatable)
        self._places[kind][name] = self._relative(path)

    def _put(self, path: Path, pieces: Iterable[Any], *, repeatable: bool = True) -> None:
        """Publishes an object and notes the digest of the bytes that were handed over."""
        written = Written()
        publish(path, lambda temporary: written.write(temporary, pieces))
        self._objects.append(StoredObject(self._relative(path), written.bytes, written.sha256, repeatable))

    def _describe(self, path: Path) -> StoredObject:
        content = path.read_bytes()
        return StoredObject(self._relative(path), len(content), digest_bytes(content))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.store.root).as_posix()


class Written:
    """Size and digest of a file, taken while it is written piece by piece."""

    def __init__(self) -> None:
        self.bytes = 0
        self._digest = hashlib.sha256()

    def write(self, path: Path, pieces: Iterable[Any]) -> None:
        """Writes all pieces to a new file."""
        with path.open("wb") as stream:
            for piece in pieces:
                self._digest.update(piece)
                self.bytes += len(piece)
                stream.write(piece)

    @property
    def sha256(self) -> str:
        """The digest of what was written, in hex."""
        return self._digest.hexdigest()


def open_store(root: Path | str, *, create: bool = False) -> Store:
    """Opens the store in a folder; with ``create`` to write to it, and as a new one where there is none.

    Raises:
        NoStoreError: no store there (unless ``create``), or a folder that holds other things.
        StoreError: a store of a newer format, or one whose marker is damaged.
    """
    root = Path(root)
    marker = root / FORMAT_FILE
    if not marker.exists():
        if not create:
            raise NoStoreError(
                f"--store: expected a store in {root}, found none: run `vitrine run --store {root}` first"
            )
        _refuse_foreign(root)
    if not marker.exists() or (_format_of(marker) < FORMAT_VERSION and create):
        # An older store takes this version's format as soon as this version writes into it.
        publish_bytes(marker, json.dumps({"format": FORMAT_VERSION, "needs": READ_SINCE[FORMAT_VERSION]}).encode())
    _format_of(marker)
    return Store(root)


def _format_of(marker: Path) -> int:
    """The format of a store that this version can read."""
    try:
        found = json.loads(marker.read_bytes())
        number = int(found["format"])
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{marker}: expected the store's format, got a damaged file; write "
            f'{{"format": {FORMAT_VERSION}}} into it if this version made the store, then run `vitrine verify`'
        ) from None
    if number > FORMAT_VERSION:
        raise StoreError(
            f"store {marker.parent} has format {number}, which needs vitrine {found.get('needs', '(newer)')} or "
            f"later; this version reads up to format {FORMAT_VERSION}: upgrade vitrine"
        )
    return number


def _refuse_foreign(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise NoStoreError(
            f"--store: expected a store, a new folder or an empty one, got {root}, which holds other things"
        )


def series_of(*ingredients: Any) -> str:
    """The digest that names an array's series: everything that must agree for shards to stand side by side."""
    return digest_json([FORMAT_VERSION, *ingredients])
