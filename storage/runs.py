"""Run records: which units a run consists of, under which keys, and how far it says it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.commits import Unit
from storage.files import publish_bytes


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


class RunLog:
    """The run records of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, run: RunRecord) -> None:
        """Puts a run record in place, whole."""
        publish_bytes(self.folder / f"{run.run_id}.json", json.dumps(asdict(run), indent=1).encode())

    def read(self, run_id: str) -> RunRecord | None:
        """The record of a run, or None."""
        try:
            return RunRecord(**json.loads((self.folder / f"{run_id}.json").read_bytes()))
        except FileNotFoundError:
            return None

    def all(self) -> list[RunRecord]:
        """All runs, the one updated last at the end."""
        runs = [RunRecord(**json.loads(path.read_bytes())) for path in sorted(self.folder.glob("*.json"))]
        return sorted(runs, key=lambda run: run.updated)

    def latest(self) -> RunRecord | None:
        """The run updated last, or None in a store without runs."""
        runs = self.all()
        return runs[-1] if runs else None
