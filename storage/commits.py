"""Commit records: a unit of work is done when its record exists and what it names is there. Nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from storage.canonical import digest_bytes, digest_json
from storage.files import publish_bytes, remove_durably
from storage.sealed import seal, unseal

KEY_CHARACTERS = 24
FILE_NAME = re.compile(r"\d{7}-[0-9a-f]{24}\.json")


@dataclass(frozen=True, order=True)
class Unit:
    """One piece of work that is committed whole: a shard of a stage, for one variant of it.

    ``variant`` is a method's id, a layer with its extractor, or empty for stages that have only one.
    """

    stage: str
    variant: str = ""
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{f' {self.variant}' if self.variant else ''} #{self.shard}"


@dataclass(frozen=True)
class StoredObject:
    """A committed file: path relative to the store, size in bytes, sha256.

    ``repeatable``: the same key always gives the same bytes; not so where times are told.
    """

    path: str
    bytes: int
    sha256: str
    repeatable: bool = True


@dataclass(frozen=True)
class CommitRecord:
    """What a unit wrote, and everything its key was made from."""

    key: str
    unit: Unit
    ingredients: Mapping[str, Any]
    objects: tuple[StoredObject, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The record as a sealed document."""
        return seal(
            {
                "key": self.key,
                "unit": asdict(self.unit),
                "ingredients": self.ingredients,
                "objects": [asdict(one) for one in self.objects],
                "facts": self.facts,
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> CommitRecord | None:
        """The record in these bytes, or None where they are not a whole, unaltered record."""
        body = unseal(content)
        if body is None:
            return None
        return cls(
            key=body["key"],
            unit=Unit(**body["unit"]),
            ingredients=body["ingredients"],
            objects=tuple(StoredObject(**one) for one in body["objects"]),
            facts=body["facts"],
        )


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key of a unit: sha256 over the canonical JSON of everything that its result depends on."""
    return digest_json(ingredients)


@lru_cache(maxsize=4096)
def slug(variant: str) -> str:
    """A variant as a folder name: readable, and distinct wherever variants are distinct."""
    if not variant:
        return "_"
    plain = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", variant)[:80]
    # "_" stands for no variant, and names of dots alone mean other folders.
    return plain if plain == variant and plain.strip("_.") else f"{plain}-{digest_bytes(variant.encode())[:8]}"


class CommitLog:
    """The commit records of one store, one small JSON file each, filed by stage and variant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, unit: Unit, key: str) -> Path:
        """Where the record of a unit with this key stands."""
        return Path(self._name(unit, key))

    def _name(self, unit: Unit, key: str) -> str:
        # As text: building paths takes longer than reading what they name, and a plan reads a hundred thousand.
        return f"{self.folder}/{unit.stage}/{slug(unit.variant)}/{unit.shard:07d}-{key[:KEY_CHARACTERS]}.json"

    def read(self, unit: Unit, key: str) -> CommitRecord | None:
        """The record of a unit with exactly this key, or None."""
        record = self._load(self._name(unit, key))
        return record if record is not None and record.key == key else None

    def write(self, record: CommitRecord) -> None:
        """Puts a record in place; from here on the unit is done."""
        publish_bytes(self.path(record.unit, record.key), record.to_bytes())

    def drop(self, unit: Unit, key: str) -> None:
        """Takes a record away, durably: the unit is no longer done."""
        remove_durably(self.path(unit, key))

    def of_unit(self, unit: Unit) -> list[CommitRecord]:
        """All records of a unit under any key, the latest written last."""
        return self.load(self.of_variant(unit.stage, unit.variant).get(unit.shard, []))

    def of_variant(self, stage: str, variant: str) -> dict[int, list[Path]]:
        """The files of all records of a stage's variant, by shard: one look at a folder for all its units."""
        found: dict[int, list[Path]] = {}
        folder = self.folder / stage / slug(variant)
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if FILE_NAME.fullmatch(entry.name):
                found.setdefault(int(entry.name[:7]), []).append(Path(entry.path))
        return found

    def load(self, paths: Iterable[Path]) -> list[CommitRecord]:
        """The whole records among some files, the latest written last."""
        return [one for path in sorted(paths, key=_modified) if (one := self._load(path)) is not None]

    def paths(self) -> Iterator[Path]:
        """The files of all records, whole or damaged."""
        return (path for path in sorted(self.folder.glob("*/*/*.json")) if FILE_NAME.fullmatch(path.name))

    def __iter__(self) -> Iterator[CommitRecord]:
        for path in self.paths():
            if (record := self._load(path)) is not None:
                yield record

    @staticmethod
    def _load(path: Path | str) -> CommitRecord | None:
        try:
            with open(path, "rb") as stream:
                return CommitRecord.from_bytes(stream.read())
        except OSError:
            return None


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # Dropped while the folder was listed.
        return 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the entries in which two sets of ingredients differ, with old and new values."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 48 else f"{text[:20]}...{hashlib.sha256(text.encode()).hexdigest()[:6]}"
