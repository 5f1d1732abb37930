"""What the report tells of a run beside leaderboard, curves and gallery, read from committed records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage.commits import KEY_CHARACTERS, CommitRecord, Unit
from storage.results import Results
from storage.runs import RunRecord
from tasks.metric_families import interval
from tasks.quarantine_rows import merged_rows
from tasks.stage import Context
from xai_core.registry import methods, metrics

QUARANTINE_ROWS = 200


@dataclass(frozen=True)
class TimingRow:
    """What a stage's variant took over all shards; ``share`` of the whole run's seconds, in [0, 1]."""

    stage: str
    variant: str
    units: int
    images: int
    seconds: float
    rate: float | None
    peak_bytes: int
    devices: str
    share: float


@dataclass(frozen=True)
class KeyRow:
    """The units of a stage's variant and the key of the first of them."""

    stage: str
    variant: str
    units: int
    key: str


class Committed:
    """The committed records that a report is about."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.units: dict[Unit, str] = dict(context.work.upstream)

    @cached_property
    def records(self) -> list[CommitRecord]:
        """All of them, in the order of the chain."""
        return [self.context.record(unit.stage, unit.variant, unit.shard) for unit in self.units]

    @cached_property
    def results(self) -> Results:
        """What they committed, to read."""
        run_id = self.context.work.facts["run_id"]
        return Results(self.context.store, tuple((run_id, record) for record in self.records))

    def of_stage(self, stage: str) -> list[CommitRecord]:
        """The records of one stage."""
        return [record for record in self.records if record.unit.stage == stage]

    @cached_property
    def run(self) -> RunRecord | None:
        """The run's own record, None where the report is made without one."""
        return self.context.store.runs.read(self.context.work.facts["run_id"])


def image_counts(committed: Committed) -> dict[str, Any]:
    """Images listed and read, those set aside anywhere, and how many predictions were right (None: unknown)."""
    listed = committed.of_stage("manifest")
    predicted = committed.of_stage("predict")
    known = [record.facts["correct"] for record in predicted if record.facts["correct"] is not None]
    judged = sum(record.facts["ok"] for record in predicted)
    correct = sum(known) if judged and len(known) == len(predicted) else None
    return {
        "listed": sum(record.facts["images"] for record in listed),
        "read": sum(record.facts["ok"] for record in listed),
        "judged": judged,
        "correct": correct,
        "accuracy": None if correct is None else correct / judged,
    }


def timings(committed: Committed) -> list[TimingRow]:
    """Seconds, rate and memory of every stage and variant, in the order of the chain."""
    rows = committed.results.table("timings").to_pylist()
    whole = sum(row["seconds"] for row in rows) or 1.0
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["method"]), []).append(row)
    return [_timing(stage, variant, members, whole) for (stage, variant), members in groups.items()]


def _timing(stage: str, variant: str, rows: list[dict[str, Any]], whole: float) -> TimingRow:
    seconds = sum(row["seconds"] for row in rows)
    images = sum(row["images"] for row in rows)
    return TimingRow(
        stage,
        variant,
        len(rows),
        images,
        seconds,
        images / seconds if images and seconds else None,
        max(row["peak_bytes"] for row in rows),
        ", ".join(sorted({row["device"] for row in rows})),
        seconds / whole,
    )


def quarantined(committed: Committed) -> tuple[list[dict[str, Any]], int, int]:
    """Rows of what was set aside (at most 200), how many rows there are, and how many images.

    Methods that stumbled over the same image in the same way share a row.
    """
    rows = merged_rows(committed.results.table("quarantine").to_pylist())
    return rows[:QUARANTINE_ROWS], len(rows), len({row["image_id"] for row in rows})


def keys(committed: Committed) -> list[KeyRow]:
    """One row for every stage and variant."""
    groups: dict[tuple[str, str], list[str]] = {}
    for unit, key in committed.units.items():
        groups.setdefault((unit.stage, unit.variant), []).append(key)
    return [
        KeyRow(stage, variant, len(found), found[0][:KEY_CHARACTERS]) for (stage, variant), found in groups.items()
    ]


def method_facts(committed: Committed) -> list[dict[str, str]]:
    """What each method is, from the registry."""
    return [
        {
            "id": choice.id,
            "summary": entry.summary,
            "source": _joined(entry.paper, entry.equation),
            "cost": entry.cost,
        }
        for choice in committed.context.config.methods
        for entry in (methods.get(choice.name),)
    ]


def metric_facts(committed: Committed) -> list[dict[str, str]]:
    """What each metric is, from the registry."""
    return [
        {
            "id": choice.id,
            "definition": entry.definition,
            "direction": "higher" if entry.higher_is_better else "lower",
            "bounds": interval(entry.bounds),
            "unit": entry.unit,
            "undefined": entry.undefined,
            "source": entry.paper,
        }
        for choice in committed.context.config.metrics
        for entry in (metrics.get(choice.name),)
    ]


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
