"""Paired differences: two methods compared by a metric on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.bootstrap import PairedMeans, bootstrap_differences
from tasks.leaderboard import direction
from tasks.measurements import Measurements


@dataclass(frozen=True)
class Difference:
    """The mean of ``first`` minus ``second`` on the ``count`` images where both have a value.

    ``low`` to ``high`` is the 95 % bootstrap interval over images of this one pair, not corrected for the number
    of pairs. ``mean`` is None without an image, ``low`` and ``high`` with fewer than two.
    """

    metric: str
    first: str
    second: str
    count: int
    mean: float | None
    low: float | None
    high: float | None
    higher_is_better: bool | None

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def winner(self) -> str | None:
        """The better method where the interval excludes 0 and the metric has a direction."""
        if not self.told_apart or self.low is None or self.higher_is_better is None:
            return None
        return self.first if (self.low > 0) == self.higher_is_better else self.second

    def seen_from(self, method: str) -> Difference:
        """The same with ``method`` first."""
        if method == self.first:
            return self
        mean, low, high = (None if value is None else 0.0 - value for value in (self.mean, self.high, self.low))
        return Difference(self.metric, self.second, self.first, self.count, mean, low, high, self.higher_is_better)


def paired_differences(measured: Measurements) -> list[Difference]:
    """Every pair of methods on every metric, each pair once, metrics and methods in the config's order."""
    if len(measured.methods) < 2:
        return []
    found = bootstrap_differences([measured.values[metric] for metric in measured.metrics])
    return [
        one
        for metric, pairs in zip(measured.metrics, found, strict=True)
        for one in _differences(metric, measured.methods, pairs)
    ]


def _differences(metric: str, methods: Sequence[str], pairs: PairedMeans) -> Iterable[Difference]:
    higher_is_better = direction(metric)
    numbers = np.stack([pairs.mean, pairs.low, pairs.high], axis=1).tolist()
    for first, second, count, row in zip(pairs.first, pairs.second, pairs.count, numbers, strict=True):
        mean, low, high = (None if value != value else value for value in row)
        yield Difference(metric, methods[first], methods[second], int(count), mean, low, high, higher_is_better)


@dataclass(frozen=True)
class Duel:
    """On how many metrics ``first`` is better than ``second``, or worse, with an interval that excludes 0.

    ``metrics`` counts those with a direction on which two images or more have a value by both.
    """

    first: str
    second: str
    better: int
    worse: int
    metrics: int


def duels(differences: Iterable[Difference]) -> dict[tuple[str, str], Duel]:
    """All metrics of every pair of methods taken together, both ways round."""
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for one in differences:
        if one.low is not None and one.higher_is_better is not None:
            pairs.setdefault((one.first, one.second), []).append(one)
    found = {}
    for (first, second), members in pairs.items():
        better = sum(one.winner == first for one in members)
        worse = sum(one.winner == second for one in members)
        found[first, second] = Duel(first, second, better, worse, len(members))
        found[second, first] = Duel(second, first, worse, better, len(members))
    return found
