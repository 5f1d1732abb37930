"""All metric values of a run as arrays, read unit by unit, and why values are missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.results import Results
from storage.views import UNTOLD

Cell = tuple[str, str]


@dataclass(frozen=True)
class Measurements:
    """Values by metric, ``[images, methods]`` float64 each, NaN where there is none.

    ``methods`` and ``metrics`` stand in the order of their appearance, which is the config's. ``missing`` counts
    the rows without a value by their reason, for every (method, metric) that was measured.
    """

    methods: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    values: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[Cell, Counter[str]] = field(default_factory=dict)


def measurements(results: Results) -> Measurements:
    """The values that are committed of one run."""
    reader = _Reader()
    for _, table in results.select("metrics").tables("metrics"):
        if table.num_rows:
            reader.take(table)
    return reader.finish()


class _Reader:
    """Gathers the tables of units: numbers and codes are kept, names once."""

    def __init__(self) -> None:
        self.methods: dict[str, int] = {}
        self.metrics: dict[str, int] = {}
        self.missing: dict[Cell, Counter[str]] = {}
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def take(self, table: pa.Table) -> None:
        """Takes in the rows of one unit."""
        values = table["value"].to_numpy()
        method = _codes(table["method"], self.methods)
        metric = _codes(table["metric"], self.metrics)
        self.rows.append(
            (table["image_id"].to_numpy(), method, metric, np.where(np.isfinite(values), values, np.nan))
        )
        self._count(table)

    def _count(self, table: pa.Table) -> None:
        reason = pc.fill_null(table["reason"], UNTOLD)
        known = pc.fill_null(pc.is_finite(table["value"]), False)
        keyed = table.select(["method", "metric"]).append_column("reason", pc.if_else(known, None, reason))
        for row in keyed.group_by(["method", "metric", "reason"]).aggregate([([], "count_all")]).to_pylist():
            counts = self.missing.setdefault((row["method"], row["metric"]), Counter())
            if row["reason"] is not None:
                counts[row["reason"]] += row["count_all"]

    def finish(self) -> Measurements:
        """What was gathered; the reader is empty then."""
        if not self.rows:
            return Measurements()
        images = np.unique(np.concatenate([np.unique(row[0]) for row in self.rows]))
        values = np.full((len(self.metrics), len(images), len(self.methods)), np.nan)
        while self.rows:
            image_id, method, metric, value = self.rows.pop()
            values[metric, np.searchsorted(images, image_id), method] = value
        return Measurements(
            tuple(self.methods), tuple(self.metrics), dict(zip(self.metrics, values, strict=True)), self.missing
        )


def _codes(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """The column as small numbers; names that are new get the next ones."""
    encoded = column.combine_chunks().dictionary_encode()
    numbers = [known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int16)[encoded.indices.to_numpy()]
