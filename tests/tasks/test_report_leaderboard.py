"""The leaderboard as the report shows it: sentences, tables of pairs, ranks and gaps, boards small and large."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tasks.leaderboard import Standing, standings_of
from tasks.measurements import Measurements
from tasks.paired import Difference, Duel, paired_differences
from tasks.report.leaderboard import leaderboard_columns
from tasks.report.overview import overview
from tasks.report.paired import claims, duel_rows, pair_table

METHODS = ("first", "second", "third", "last")
METRICS = ("insertion", "deletion", "gini", "entropy", "iou", "pointing_game")


def board(metrics: tuple[str, ...] = METRICS, images: int = 40) -> Measurements:
    """Every method is worse than the one before it, the second by next to nothing; the last has no IoU at all."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(images, 4))
    merit = np.array([0.9, 0.899, 0.5, 0.1]) + 0.05 * (noise - noise.mean(axis=0))
    lower_is_better = ("deletion", "entropy")
    values = {metric: 1.0 - merit if metric in lower_is_better else merit.copy() for metric in metrics}
    missing = {(method, metric): Counter[str]() for method in METHODS for metric in metrics}
    if "iou" in values:
        values["iou"][:, 3] = np.nan
        missing["last", "iou"] = Counter({"the mask is empty": images})
    return Measurements(METHODS, metrics, values, missing)


def test_every_method_is_held_against_the_best() -> None:
    measured = board()
    rows, differences = standings_of(measured), paired_differences(measured)
    for metric, higher in (("insertion", True), ("deletion", False)):
        table = pair_table(metric, rows, [one for one in differences if one.metric == metric])
        assert table is not None
        assert table.best == "first"
        assert [(row.difference.first, row.difference.second, row.said) for row in table.rows] == [
            ("second", "first", "not told apart"),
            ("third", "first", "worse"),
            ("last", "first", "worse"),
        ]
        for row in table.rows:
            assert (row.difference.mean is not None) and (row.difference.mean < 0) == higher
            assert 0 <= row.low <= row.mean <= row.high <= 100
            assert (row.low <= row.zero <= row.high) == (row.said == "not told apart")


def test_a_method_may_be_better_than_the_best_where_both_have_a_value() -> None:
    rows = [
        Standing("a", "iou", 0.9, 0.8, 1.0, 9, 0, True),
        Standing("b", "iou", 0.8, 0.7, 0.9, 5, 4, True),
        Standing("c", "iou", 0.1, None, None, 1, 8, True),
        Standing("d", "iou", None, None, None, 0, 9, True),
    ]
    pairs = [
        Difference("iou", "a", "b", 5, -0.1, -0.2, -0.05, True),
        Difference("iou", "a", "c", 1, 0.5, None, None, True),
        Difference("iou", "a", "d", 0, None, None, None, True),
    ]
    table = pair_table("iou", rows, pairs)
    assert table is not None
    assert [(row.difference.first, row.said) for row in table.rows] == [
        ("b", "better"),
        ("c", "too few images"),
        ("d", "too few images"),
    ]
    assert pair_table("iou", [Standing("a", "iou", 0.9, 0.8, 1.0, 9, 0, None)], []) is None


def test_the_sentence_names_every_rival_of_few_and_the_closest_of_many() -> None:
    few = [Duel("a", "b", 2, 1, 6), Duel("a", "c", 6, 0, 6)]
    assert claims(["a"], by_pair(few)) == (
        "On the same images it beats b on 2 of 6 metrics and c on 6 of 6 with an interval that excludes 0."
    )
    assert claims(["a"], by_pair(few[:1])) == (
        "On the same images it beats b on 2 of 6 metrics with an interval that excludes 0."
    )
    many = [*few, Duel("a", "d", 5, 0, 6), Duel("a", "e", 4, 0, 5)]
    assert claims(["a"], by_pair(many)) == (
        "On the same images it beats b, its closest rival, on 2 of 6 metrics and loses on 1, and each of the "
        "others on 4 to 6, with an interval that excludes 0."
    )
    assert claims(["a", "b"], by_pair(many)) == ""
    assert claims([], {}) == ""


def by_pair(found: list[Duel]) -> dict[tuple[str, str], Duel]:
    back = [Duel(one.second, one.first, one.worse, one.better, one.metrics) for one in found]
    return {(one.first, one.second): one for one in (*found, *back)}


def test_the_square_of_duels_begins_with_who_is_better_most_often() -> None:
    rows = duel_rows(by_pair([Duel("a", "b", 1, 4, 6), Duel("a", "c", 3, 0, 6), Duel("b", "c", 5, 0, 6)]))
    assert [row.method for row in rows] == ["b", "a", "c"]
    assert [[one and one.better for one in row.duels] for row in rows] == [
        [None, 4, 5],
        [1, None, 3],
        [0, 0, None],
    ]
    assert duel_rows({}) == []


def test_ranks_of_a_large_board_in_families_and_by_mean_rank() -> None:
    measured = board()
    found = overview(standings_of(measured), paired_differences(measured))
    assert found is not None
    assert [(family.title, [metric for metric, _ in members]) for family, members in found.families] == [
        ("Perturbation", ["insertion", "deletion"]),
        ("Localisation", ["iou", "pointing_game"]),
        ("Complexity", ["gini", "entropy"]),
    ]
    assert [row.method for row in found.rows] == list(METHODS)
    ranks = [[cell and (cell.rank, cell.level) for cell in row.cells] for row in found.rows]
    assert ranks == [
        [(1, True)] * 6,
        [(2, True)] * 6,
        [(3, False)] * 6,
        [(4, False), (4, False), None, (4, False), (4, False), (4, False)],
    ]
    assert found.rows[0].cells[0] is not None
    assert found.rows[0].cells[0].shade == 1.0
    assert [row.mean_rank for row in found.rows] == [1, 2, 3, 4]


def test_equal_means_share_a_rank() -> None:
    rows = [Standing(method, metric, 1.0, 1, 1, 3, 0, True) for method in METHODS for metric in METRICS]
    found = overview(rows, [])
    assert found is not None
    assert {cell.rank for row in found.rows for cell in row.cells if cell} == {1}


@pytest.mark.parametrize("metrics", [METRICS[:5], ()])
def test_a_small_board_needs_no_overview(metrics: tuple[str, ...]) -> None:
    measured = board(metrics)
    assert overview(standings_of(measured), paired_differences(measured)) is None


def test_a_cell_tells_why_values_are_missing() -> None:
    (column,) = leaderboard_columns(
        [Standing("a", "iou", 0.5, 0.4, 0.6, 5, 3, True, {"the mask is empty": 2, "the map is constant": 1})],
        ["a", "b"],
    )
    assert column.cells["a"] is not None
    assert column.cells["a"].why == "the mask is empty: 2; the map is constant: 1"
    assert column.cells["b"] is None
