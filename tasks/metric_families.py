"""Families of metrics: in which order they are shown, and the question that each answers, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import xai_core.metrics  # noqa: F401  (registers the metrics)
from xai_core.registry import MetricEntry, metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Family:
    """A family's heading and what its metrics ask."""

    title: str
    question: str


FAMILIES = {
    "perturbation": Family("Perturbation", "Does the output follow when relevant pixels or parts come and go?"),
    "localisation": Family("Localisation", "Does the relevance lie on the object?"),
    "complexity": Family("Complexity", "Is the relevance concentrated on little?"),
    "robustness": Family("Robustness", "Does the explanation stay while the picture hardly changes?"),
    "sanity": Family("Sanity", "Does the explanation change when the model or the label does?"),
    "semanticity": Family("Semanticity", "Do important patches follow the outlines of things?"),
    "truth": Family("Truth", "Do the scores of parts agree with their true effect, where it is known?"),
}
OTHER = Family("Other", "Metrics that this version does not know.")


def entry_of(metric: str) -> MetricEntry | None:
    """The entry of a metric's id, variant or not; None where it is no longer registered."""
    name = metric.split("[")[0]
    return metrics.get(name) if name in metrics else None


def family_of(metric: str) -> str:
    """The family of a metric's id; empty where it is no longer registered."""
    entry = entry_of(metric)
    return entry.family if entry else ""


def interval(bounds: tuple[float | None, float | None]) -> str:
    """What values can be, as people write it: ``[0, 1]``, ``[0, ∞)``."""
    low, high = bounds
    return f"{'(-∞' if low is None else f'[{low:g}'}, {'∞)' if high is None else f'{high:g}]'}"


def by_family(items: Iterable[T], metric: Callable[[T], str]) -> list[tuple[Family, list[T]]]:
    """Items by the family of their metric, families in the order above, items in their own."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(family_of(metric(item)), []).append(item)
    order = [*FAMILIES, *(name for name in found if name not in FAMILIES)]
    return [(FAMILIES.get(name, OTHER), found[name]) for name in order if name in found]
