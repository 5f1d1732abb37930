"""Reading what is committed: tables, arrays and images of some runs, in notebooks and in the report alike."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from storage import arrays
from storage.commits import CommitRecord
from storage.errors import StoreError
from storage.schema import TABLES

if TYPE_CHECKING:
    import xarray
    import zarr

    from storage.store import Store

IMAGE = "image"
VALID = "valid"


@dataclass(frozen=True)
class StoredImage:
    """An image of a run: what it is, and the class that its explanations are about (None: not predicted)."""

    run_id: str
    image_id: int
    path: str
    sha256: str
    width: int
    height: int
    label: int | None
    label_name: str | None
    target: int | None
    target_name: str | None
    correct: bool | None


@dataclass(frozen=True)
class Results:
    """The committed units of some runs. Shards that are not committed are not there at all."""

    store: Store
    members: tuple[tuple[str, CommitRecord], ...]

    def select(self, stage: str | None = None, shards: Container[int] | None = None) -> Results:
        """The results of one stage, of some shards, or both."""
        return Results(
            self.store,
            tuple(
                (run_id, record)
                for run_id, record in self.members
                if stage in (None, record.unit.stage) and (shards is None or record.unit.shard in shards)
            ),
        )

    def records(self) -> list[CommitRecord]:
        """The commit records, each once."""
        return list({record.key: record for _, record in self.members}.values())

    def table(self, name: str) -> pa.Table:
        """All rows of a table, with the column ``run_id`` first; views by name as in SQL.

        Raises:
            StoreError: no such table or view.
        """
        if name in TABLES:
            return self._stored_table(name)
        from storage.sql import query, table_names

        if name not in table_names():
            raise StoreError(f"expected a table or view, got {name!r}; there are: {', '.join(table_names())}")
        return query(self.store, f'select * from "{name}"', run_ids=self._run_ids())

    def _stored_table(self, name: str) -> pa.Table:
        names = TABLES[name].names
        parts = [TABLES[name].empty_table().add_column(0, "run_id", pa.array([], pa.string()))]
        for run_id in self._run_ids():
            records = [record for owner, record in self.members if owner == run_id]
            rows = self.store.dataset(name, records).to_table(columns=names)
            parts.append(rows.add_column(0, "run_id", pa.repeat(run_id, rows.num_rows)))
        return pa.concat_tables(parts)

    def tables(self, name: str) -> Iterator[tuple[CommitRecord, pa.Table]]:
        """A stored table's rows unit by unit, so that memory does not grow with the run; digests are checked.

        Raises:
            StoreError: a file is not what was committed.
        """
        for record in self.records():
            yield record, self.store.read_table(record, name)

    def array_names(self) -> list[str]:
        """Every array as ``stage/array`` or ``stage/variant/array``."""
        return list(dict.fromkeys(name for _, record in self.members for name in _arrays_of(record)))

    def array(self, name: str) -> zarr.Array:
        """An array as it lies in the store: row = image id, also rows that are not committed (yet).

        Raises:
            StoreError: no such array, or its rows lie in several; ``xarray`` joins these.
        """
        places = self._places(name)
        paths = list(dict.fromkeys(place["path"] for place in places))
        if len(paths) > 1:
            raise StoreError(
                f"array {name}: expected one Zarr array, its rows lie in {len(paths)} ({', '.join(paths)}): "
                f"use xarray({name!r}), which joins them, or name one run"
            )
        return arrays.open_array(self.store.root / paths[0])

    def xarray(self, name: str) -> xarray.DataArray:
        """The committed rows of an array, with coordinates ``image`` (its id) and, where known, ``valid``.

        Read when used where the rows lie in one Zarr array, at once where they are joined from several.

        Raises:
            StoreError: no such array.
        """
        import xarray

        parts = []
        for path in dict.fromkeys(place["path"] for place in self._places(name)):
            places = [place for place in self._places(name) if place["path"] == path]
            parts.append(_open_rows(self.store, path, sorted(places, key=_image_of)))
        whole = parts[0] if len(parts) == 1 else xarray.concat(parts, dim=IMAGE, combine_attrs="override")
        return whole.rename(name)

    def images(self) -> Iterator[StoredImage]:
        """Every image that could be read, run by run, in the order of its id."""
        fields = list(StoredImage.__dataclass_fields__)
        for run_id in self._run_ids():
            table = Results(self.store, tuple(one for one in self.members if one[0] == run_id)).table("images")
            for row in table.select(fields).sort_by("image_id").to_pylist():
                yield StoredImage(**row)

    def _places(self, name: str) -> list[dict[str, Any]]:
        found = {record.key: _arrays_of(record).get(name) for _, record in self.members}
        places = [place for place in found.values() if place is not None]
        if not places:
            known = ", ".join(self.array_names()) or "none yet"
            raise StoreError(f"expected an array of this run, got {name!r}; there are: {known}")
        return places

    def _run_ids(self) -> list[str]:
        return list(dict.fromkeys(run_id for run_id, _ in self.members))


def _arrays_of(record: CommitRecord) -> dict[str, dict[str, Any]]:
    """The arrays that a record wrote into, by their full names."""
    prefix = "/".join(part for part in (record.unit.stage, record.unit.variant) if part)
    return {f"{prefix}/{name}": place for name, place in record.facts.get("arrays", {}).items()}


def _image_of(place: dict[str, Any]) -> int:
    return int(place.get("image", place["start"]))


def _open_rows(store: Store, path: str, places: list[dict[str, Any]]) -> xarray.DataArray:
    """The committed rows of one Zarr array."""
    import numpy as np
    import xarray

    folder, name = (store.root / path).parent, path.rsplit("/", 1)[1]
    rows = np.concatenate([np.arange(place["start"], place["stop"]) for place in places])
    ids = np.concatenate([np.arange(p["stop"] - p["start"]) + _image_of(p) for p in places])
    group = xarray.open_zarr(folder, consolidated=False, chunks=None)
    chosen = group[name].isel({IMAGE: rows}).assign_coords({IMAGE: ids})
    if VALID not in group or name == VALID:
        return chosen
    return chosen.assign_coords({VALID: (IMAGE, group[VALID].isel({IMAGE: rows}).values)})
