"""Which metrics agree with the truth: rank correlations with ``true_effect_rank``, method by method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from storage.results import Results
from tasks.leaderboard import arrow, direction
from tasks.measurements import Measurements, measurements
from tasks.metric_families import family_of
from xai_core.metrics.correlation import spearman

TRUTH = "true_effect_rank"

# A rank correlation of two pairs is 1 or -1 whatever they are.
FEWEST = 3

# Two-sided 95 % of the normal distribution; correlations of unrelated ranks have the width 1 / sqrt(n - 1).
Z95 = 1.96


@dataclass(frozen=True)
class Agreement:
    """A rank correlation over ``count`` images or methods."""

    correlation: float
    count: int

    @property
    def by_chance(self) -> bool:
        """Whether one in twenty pairs of unrelated rankings correlates as much."""
        return abs(self.correlation) * (self.count - 1) ** 0.5 < Z95

    @property
    def tint(self) -> str:
        """How strong the cell's colour is, in percent."""
        return f"{100 * abs(self.correlation):.0f}%"


@dataclass(frozen=True)
class AgreementRow:
    """A metric's agreement over images by method, their mean, and that of the methods' means; None: undefined."""

    metric: str
    arrow: str
    mean: float | None
    cells: tuple[Agreement | None, ...]
    over_methods: Agreement | None


@dataclass(frozen=True)
class TruthTable:
    """The metrics of a run, those that agree most first; ``verdict`` says it in a sentence."""

    methods: tuple[str, ...]
    rows: tuple[AgreementRow, ...]
    verdict: str


def read_truth_table(results: Results, metrics: Sequence[str]) -> TruthTable | None:
    """The table of a run with these metrics, or None where none of them tells the truth."""
    return truth_table(measurements(results)) if TRUTH in metrics else None


def truth_table(measured: Measurements) -> TruthTable | None:
    """How a run's metrics agree with the true effects, or None where the run does not know these.

    Values are turned so that higher is better; an image counts where it has a value of both.
    """
    if TRUTH not in measured.values:
        return None
    names = [name for name in measured.metrics if family_of(name) not in ("", "truth")]
    rows = [_row(name, measured.values[name], measured.values[TRUTH]) for name in names]
    rows.sort(key=lambda row: -2.0 if row.mean is None else row.mean, reverse=True)
    return TruthTable(measured.methods, tuple(rows), _verdict(rows)) if rows else None


def _row(metric: str, values: np.ndarray, truth: np.ndarray) -> AgreementRow:
    """The row of a metric, from its values and the truth's ``[images, methods]``."""
    better = direction(metric)
    merit = values if better else -values
    cells = tuple(_agreements(merit.T, truth.T))
    (over_methods,) = _agreements(_means(merit)[None], _means(truth)[None])
    known = [cell.correlation for cell in cells if cell is not None]
    return AgreementRow(metric, arrow(better), fmean(known) if known else None, cells, over_methods)


def _agreements(first: np.ndarray, second: np.ndarray) -> list[Agreement | None]:
    """The rank correlation of every pair of rows ``[r, n]``, over the columns where both have a value."""
    both = torch.from_numpy(np.isfinite(first) & np.isfinite(second))
    found = spearman(torch.from_numpy(first), torch.from_numpy(second), both).tolist()
    counts = both.sum(dim=1).tolist()
    return [
        Agreement(correlation, count) if count >= FEWEST and correlation == correlation else None
        for correlation, count in zip(found, counts, strict=True)
    ]


def _means(values: np.ndarray) -> np.ndarray:
    """Means over the images that have a value, ``[methods]``, NaN without any."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def signed(correlation: float) -> str:
    """A correlation with its sign and two digits; what rounds to nothing has no minus."""
    return f"{round(correlation, 2) + 0.0:+.2f}"


def _verdict(rows: Sequence[AgreementRow]) -> str:
    """Which metric agrees most and which least, of those defined for all methods; empty with fewer than two."""
    means = [(row.mean, row.metric) for row in rows if row.mean is not None and None not in row.cells]
    if len(means) < 2:
        return ""
    (most, first), (least, last) = means[0], means[-1]
    return (
        f"Image by image, {first} agrees most with the true effects (rank correlation {signed(most)}, the mean "
        f"over methods) and {last} least ({signed(least)})."
    )
