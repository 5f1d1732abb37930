"""The section about what a study trained: loss and measures by epoch, and what the weights come to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from storage.commits import CommitRecord
from storage.results import Results
from tasks.report.concept_charts import ConceptChart, Line, line_chart
from tasks.report.figures import LegendEntry, legend
from tasks.training.config import TrainingConfig
from tasks.training.stage import STAGE, TABLE

SPLITS = {"train": "learnt from", "held_out": "held out", "test": "test pictures"}
# When their values are taken.
MEASURED = {SPLITS["train"]: "mean over the batches of an epoch", SPLITS["held_out"]: "after every epoch"}
RATE = "as every epoch ended"
# What is told first of all that is logged, and last.
FIRST, LAST = ("score", "loss"), ("learning_rate",)


@dataclass(frozen=True)
class TrainingSection:
    """What the section shows; ``table``: what every name came to by split, None where it was not measured.

    ``epoch``: whose weights were taken; ``score``: of the held-out pictures then, None where none are held out.
    """

    kind: str
    pictures: int
    held_out: int
    epoch: int
    epochs: int
    score: float | None
    splits: tuple[str, ...]
    table: tuple[tuple[str, tuple[float | None, ...]], ...]
    legend: tuple[LegendEntry, ...]
    charts: tuple[ConceptChart, ...]

    @property
    def figures(self) -> list[Any]:
        """Plotly figures, in the order in which they stand."""
        return [json.loads(chart.json) for chart in self.charts]


def training_of_run(results: Results, training: TrainingConfig | None) -> TrainingSection | None:
    """The section of a run, or None where it trained nothing."""
    records = results.select(STAGE.name).records()
    if training is None or not records:
        return None
    return training_section(results.table(TABLE), records[0], training)


def training_section(rows: pa.Table, record: CommitRecord, training: TrainingConfig) -> TrainingSection:
    """The section from rows of the log and the record that they belong to."""
    facts, values = record.facts, rows.to_pylist()
    names = sorted({row["name"] for row in values}, key=_place)
    by_epoch = [name for name in names if any(row["name"] == name and row["split"] != "test" for row in values)]
    splits = tuple(split for split in SPLITS if any(row["split"] == split for row in values))
    final = {(row["split"], row["name"]): row["value"] for row in values if row["epoch"] == facts["epoch"]}
    entries = legend([SPLITS[split] for split in splits if split != "test"])
    return TrainingSection(
        kind=training.kind.id,
        pictures=facts["pictures"],
        held_out=facts["held_out"],
        epoch=facts["epoch"],
        epochs=training.recipe.epochs,
        score=facts["score"],
        splits=tuple(SPLITS[split] for split in splits),
        table=tuple((_words(name), tuple(final.get((split, name)) for split in splits)) for name in names),
        legend=tuple(entries),
        charts=tuple(_chart(name, values, entries) for name in by_epoch) if training.recipe.epochs > 1 else (),
    )


def _place(name: str) -> tuple[int, str]:
    order = [*FIRST, "", *LAST]
    return order.index(name if name in order else ""), name


def _words(name: str) -> str:
    return name.replace("_", " ")


def _chart(name: str, rows: list[dict[str, Any]], entries: list[LegendEntry]) -> ConceptChart:
    lines = []
    for split in ("train", "held_out"):
        of = sorted((row["epoch"], row["value"]) for row in rows if (row["split"], row["name"]) == (split, name))
        if of:
            lines.append(Line(SPLITS[split], *(np.array(column, np.float64) for column in zip(*of, strict=True))))
    known = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [np.zeros(0)])
    low, high = min(0.0, known.min(initial=0.0)), max(0.0, known.max(initial=0.0))
    room = 0.04 * ((high - low) or 1.0)
    span = (low - room * (low < 0), high + room)
    told = RATE if name in LAST else "; ".join(f"{line.name}: {MEASURED[line.name]}" for line in lines)
    return line_chart(_words(name).capitalize(), told, lines, entries, "epoch", _words(name), span, whole=True)
