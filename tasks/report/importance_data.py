"""What a run measured of networks that weigh their patches: read unit by unit, with intervals over the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.commits import CommitRecord
from storage.results import Results
from tasks.bootstrap import bootstrap_means
from tasks.importance.seeds import REPRODUCIBILITY
from tasks.importance.seeds import STAGE as SEEDS
from tasks.importance.stage import ACCURACY, SCORES, STAGE
from xai_core.inherent.semanticity import OF_IMPORTANCE, OF_MASKS

#: The values that a picture has, in the order in which they are told.
VALUES = ("accuracy", "masked", *OF_IMPORTANCE, *OF_MASKS, REPRODUCIBILITY)


@dataclass(frozen=True)
class Mean:
    """A mean over ``count`` images with its 95 % bootstrap interval; None without a value, or fewer than two."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass
class Measured:
    """A network as the report tells of it: what it is, its means by name of value, and its thresholds.

    ``curves``: by direction ``[T, 3]`` threshold, mean accuracy and mean share masked, over ``images``.
    ``seeds`` are those of the set that it is part of, empty where it is part of none.
    """

    id: str
    title: str
    seed: int | None
    images: int = 0
    means: dict[str, Mean] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


# Values of images by name: ids and values.
Column = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class _Gathered:
    """Sums over the images by trial, and the values that every image has of its own."""

    trials: list[tuple[str, float | None]] = field(default_factory=list)
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    columns: dict[str, Column] = field(default_factory=dict)

    def take_accuracy(self, table: pa.Table) -> None:
        """Takes in rows of ``importance_accuracy``, which stand picture by picture."""
        if not table.num_rows:
            return
        ids = table["image_id"].to_numpy()
        trials = int((ids == ids[0]).sum())
        first = table.slice(0, trials)
        self.trials = list(zip(first["direction"].to_pylist(), first["threshold"].to_pylist(), strict=True))
        values = np.stack([table[name].cast(pa.float64()).to_numpy() for name in ("correct", "masked")], axis=1)
        values = values.reshape(-1, trials, 2)
        self.sums = values.sum(axis=0) + (self.sums if len(self.sums) else 0.0)
        own = self.trials.index(("own", None))
        for column, name in enumerate(("accuracy", "masked")):
            self.columns.setdefault(name, []).append((ids[::trials], values[:, own, column]))

    def take_scores(self, table: pa.Table) -> None:
        """Takes in rows of ``importance_scores``."""
        for name in dict.fromkeys(table["metric"].to_pylist()):
            rows = table.filter(pc.equal(table["metric"], name))
            values = rows["value"].to_numpy(zero_copy_only=False)
            self.columns.setdefault(name, []).append((rows["image_id"].to_numpy(), values.astype(np.float64)))


def measured_networks(results: Results) -> list[Measured]:
    """The networks that a run evaluated, in the config's order."""
    gathered: dict[str, _Gathered] = defaultdict(_Gathered)
    for record, table in results.select(STAGE.name).tables(ACCURACY):
        gathered[record.unit.variant].take_accuracy(table)
    for stage in (STAGE, SEEDS):
        for record, table in results.select(stage.name).tables(SCORES):
            gathered[record.unit.variant].take_scores(table)
    means = _means(gathered)
    # All shards of a variant tell the same of it.
    networks, sets = (
        {record.unit.variant: record for record in results.select(stage.name).records()}
        for stage in (STAGE, SEEDS)
    )
    return [_measured(record, gathered[name], means, list(sets.values())) for name, record in networks.items()]


def _measured(
    record: CommitRecord,
    gathered: _Gathered,
    means: dict[tuple[str, str], Mean],
    sets: Sequence[CommitRecord],
) -> Measured:
    name = record.unit.variant
    found = Measured(name, record.facts["title"], record.facts["seed"])
    found.means = {value: mean for (network, value), mean in means.items() if network == name}
    found.images = found.means["accuracy"].count if "accuracy" in found.means else 0
    for one in sets:
        if name in one.facts["members"]:
            found.seeds = tuple(one.facts["seeds"])
            found.means |= {value: mean for (of, value), mean in means.items() if of == one.unit.variant}
    for direction in ("insertion", "deletion"):
        rows = [
            (threshold, *(gathered.sums[at] / found.images))
            for at, (of, threshold) in enumerate(gathered.trials)
            if of == direction
        ]
        found.curves[direction] = np.array(rows, np.float64).reshape(-1, 3)
    return found


def _means(gathered: dict[str, _Gathered]) -> dict[tuple[str, str], Mean]:
    """Means by network (or set) and value, all over the same resamples of the images."""
    columns = {
        (name, value): [np.concatenate(parts) for parts in zip(*gathered[name].columns[value], strict=True)]
        for name in gathered
        for value in VALUES
        if value in gathered[name].columns
    }
    if not columns:
        return {}
    images = np.unique(np.concatenate([ids for ids, _ in columns.values()]))
    values = np.full((len(images), len(columns)), np.nan)
    for at, (ids, some) in enumerate(columns.values()):
        values[np.searchsorted(images, ids), at] = some
    counts = (~np.isnan(values)).sum(axis=0).tolist()
    bounds = zip(*(map(_number, bound.tolist()) for bound in bootstrap_means(values)), counts, strict=True)
    return {cell: Mean(*bound) for cell, bound in zip(columns, bounds, strict=True)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
