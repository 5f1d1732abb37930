"""Paired differences as the report shows them: every method against the best, and methods against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.leaderboard import Standing, arrow, best, direction
from tasks.paired import Difference, Duel

# A sentence names each rival up to so many; of more, the closest one.
MOST_NAMED = 3


@dataclass(frozen=True)
class PairRow:
    """A method against the best one; ``zero``, ``low``, ``mean`` and ``high`` are places in percent of a bar."""

    difference: Difference
    said: str
    zero: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class PairTable:
    """A metric: its best method and every other method against it, on one scale."""

    metric: str
    arrow: str
    best: str
    rows: list[PairRow]


@dataclass(frozen=True)
class DuelRow:
    """A method against every other: None against itself and where nothing was compared."""

    method: str
    duels: list[Duel | None]


def pair_table(metric: str, standings: Sequence[Standing], differences: Iterable[Difference]) -> PairTable | None:
    """The methods against the best of a metric, or None where it has no best."""
    winners = {method for method, of in best(standings) if of == metric}
    leader = next((row.method for row in standings if row.method in winners), None)
    if leader is None:
        return None
    pairs = [one for one in differences if leader in (one.first, one.second)]
    rivals = [one.seen_from(one.second if one.first == leader else one.first) for one in pairs]
    known = [end for one in rivals for end in (one.low, one.mean, one.high) if end is not None]
    floor, top = min([0.0, *known]), max([0.0, *known])
    return PairTable(metric, arrow(direction(metric)), leader, [_row(one, floor, top - floor) for one in rivals])


def _row(difference: Difference, floor: float, width: float) -> PairRow:
    def place(value: float | None) -> float:
        value = (difference.mean or 0.0) if value is None else value
        return 50.0 if width == 0 else round(100.0 * (value - floor) / width, 2)

    ends = (place(end) for end in (difference.low, difference.mean, difference.high))
    return PairRow(difference, _said(difference), place(0.0), *ends)


def _said(difference: Difference) -> str:
    if difference.low is None:
        return "too few images"
    if difference.winner is None:
        return "not told apart"
    return "better" if difference.winner == difference.first else "worse"


def duel_rows(duels: Mapping[tuple[str, str], Duel]) -> list[DuelRow]:
    """All duels as a square; the method that is better most often comes first."""
    methods = list(dict.fromkeys(method for pair in duels for method in pair))
    won = {method: sum(one.better for one in duels.values() if one.first == method) for method in methods}
    order = sorted(methods, key=lambda method: -won[method])
    return [DuelRow(method, [duels.get((method, other)) for other in order]) for method in order]


def claims(leaders: Sequence[str], duels: Mapping[tuple[str, str], Duel]) -> str:
    """One sentence: whom the single leader beats on how many metrics, by intervals that exclude 0."""
    found = [duels[pair] for pair in duels if [pair[0]] == list(leaders)]
    if not found:
        return ""
    tail = "with an interval that excludes 0."
    if len(found) <= MOST_NAMED:
        metrics = [_metrics(found[0].metrics), *(str(one.metrics) for one in found[1:])]
        named = [f"{one.second} on {one.better} of {of}" for one, of in zip(found, metrics, strict=True)]
        return f"On the same images it beats {_joined(named)} {tail}"
    closest = min(found, key=lambda one: one.better - one.worse)
    others = [one.better for one in found if one is not closest]
    span = f"{min(others)} to {max(others)}" if min(others) < max(others) else f"{min(others)}"
    lost = f" and loses on {closest.worse}" if closest.worse else ""
    return (
        f"On the same images it beats {closest.second}, its closest rival, on {closest.better} of "
        f"{_metrics(closest.metrics)}{lost}, and each of the others on {span}, {tail}"
    )


def _metrics(count: int) -> str:
    return f"{count} metric" if count == 1 else f"{count} metrics"


def _joined(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
