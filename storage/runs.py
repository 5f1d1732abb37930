"""Run records: which units a run consists of, under which keys, and how far it says it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.commits import Unit
from storage.files import remove_durably
from storage.sealed import unseal, write_sealed


def now() -> str:
    """The present moment in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunRecord:
    """One run: the same config always has the same run_id, so running again is resuming.

    ``keys`` maps stage, variant and shard to the key that the run refers to, whether or not its record
    exists yet: what is done is told by the records alone.
    """

    run_id: str
    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    state: str = "running"
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)
    facts: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)

    def with_keys(self, keys: Mapping[Unit, str]) -> RunRecord:
        """The record with the keys of more units; those of the same stages are replaced."""
        merged: dict[str, dict[str, dict[str, str]]] = {
            stage: {variant: dict(shards) for variant, shards in variants.items()}
            for stage, variants in self.keys.items()
            if stage not in {unit.stage for unit in keys}
        }
        for unit, key in keys.items():
            merged.setdefault(unit.stage, {}).setdefault(unit.variant, {})[str(unit.shard)] = key
        return replace(self, keys=merged, updated=now())

    def units(self) -> dict[Unit, str]:
        """Every unit of the run with its key."""
        return {
            Unit(stage, variant, int(shard)): key
            for stage, variants in self.keys.items()
            for variant, shards in variants.items()
            for shard, key in shards.items()
        }


FIELDS = frozenset(one.name for one in fields(RunRecord))


class RunLog:
    """The run records of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run_id: str) -> Path:
        """Where the record of a run stands."""
        return self.folder / f"{run_id}.json"

    def write(self, run: RunRecord) -> None:
        """Puts a run record in place, whole."""
        write_sealed(self.path(run.run_id), asdict(run))

    def read(self, run_id: str) -> RunRecord | None:
        """The record of a run, or None where there is none or it is damaged."""
        return load_run(self.path(run_id))

    def delete(self, run_id: str) -> None:
        """Forgets a run, durably; what it shares with other runs stays theirs."""
        remove_durably(self.path(run_id))

    def paths(self) -> list[Path]:
        """The files of all runs, whole or damaged."""
        return sorted(self.folder.glob("*.json"))

    def all(self) -> list[RunRecord]:
        """All runs whose records are whole, the one updated last at the end; ``verify`` names the others."""
        runs = [run for path in self.paths() if (run := load_run(path)) is not None]
        return sorted(runs, key=lambda run: run.updated)

    def latest(self) -> RunRecord | None:
        """The run updated last, or None in a store without runs."""
        runs = self.all()
        return runs[-1] if runs else None


def load_run(path: Path) -> RunRecord | None:
    """The run record in a file, or None where there is none, or what is there is not one."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = unseal(content)
    if body is None:
        body = _format_1(content)
    return RunRecord(**body) if isinstance(body, dict) and "run_id" in body and body.keys() <= FIELDS else None


def _format_1(content: bytes) -> Any:
    """Stores of format 1 did not seal their run records."""
    try:
        return json.loads(content)
    except ValueError:
        return None
