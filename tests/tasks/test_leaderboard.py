"""The leaderboard's numbers: values and reasons as stored, paired differences against a slow twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from storage import open_store
from storage.commits import Unit
from storage.results import Results
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.store import Store
from storage.views import UNTOLD
from tasks.bootstrap import PairedMeans, bootstrap_differences, bootstrap_means
from tasks.leaderboard import Gap, gaps, leaderboard, leaderboard_markdown, standings
from tasks.measurements import Measurements, measurements
from tasks.paired import Difference, duels, paired_differences

EMPTY, CONSTANT = "the mask is empty", "the map is constant"
# Image, metric, value, reason; of one method and one shard.
Row = tuple[int, str, float | None, str | None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


def committed(store: Store, units: dict[tuple[str, int], list[Row]]) -> Results:
    """The results of units by method and shard."""
    members = []
    for (method, shard), rows in units.items():
        commit = store.begin(Unit("metrics", method, shard), f"{method}{shard}".ljust(64, "k"), {})
        image_id, metric, value, reason = (list(column) for column in zip(*rows, strict=True))
        columns = {"image_id": image_id, "method": [method] * len(rows), "metric": metric}
        commit.table("metrics", rows_to_table("metrics", {**columns, "value": value, "reason": reason}))
        members.append(("run", commit.finish({})))
    return Results(store, tuple(members))


UNITS: dict[tuple[str, int], list[Row]] = {
    ("b", 1): [
        (7, "deletion", 0.25, None),
        (5, "deletion", 0.5, None),
        (5, "iou", None, EMPTY),
        (7, "iou", 0.0, None),
    ],
    ("b", 0): [(2, "deletion", None, CONSTANT), (2, "iou", None, EMPTY)],
    ("a", 0): [(2, "deletion", 1.0, None), (2, "iou", None, EMPTY)],
    ("a", 1): [
        (5, "deletion", math.inf, None),
        (5, "iou", None, None),
        (7, "deletion", 0.75, None),
        (7, "iou", 1, None),
    ],
}


def test_values_stand_by_image_and_method_whatever_the_order_of_shards(store: Store) -> None:
    found = measurements(committed(store, UNITS))
    assert found.methods == ("b", "a")
    assert found.metrics == ("deletion", "iou")
    nan = math.nan
    assert np.array_equal(found.values["deletion"], [[nan, 1.0], [0.5, nan], [0.25, 0.75]], equal_nan=True)
    assert np.array_equal(found.values["iou"], [[nan, nan], [nan, nan], [0.0, 1.0]], equal_nan=True)


def test_what_is_missing_is_counted_by_reason(store: Store) -> None:
    rows = {(row.method, row.metric): row for row in standings(committed(store, UNITS))}
    assert list(rows) == [("b", "deletion"), ("b", "iou"), ("a", "deletion"), ("a", "iou")]
    assert rows["b", "deletion"].reasons == {CONSTANT: 1}
    assert rows["b", "iou"].reasons == {EMPTY: 2}
    # A store of an earlier version tells no reason, and infinity is no value.
    assert rows["a", "iou"].reasons == {EMPTY: 1, UNTOLD: 1}
    assert rows["a", "deletion"].reasons == {UNTOLD: 1}
    assert all(row.nulls == sum(row.reasons.values()) for row in rows.values())
    assert {cell: row.count for cell, row in rows.items()} == dict(zip(rows, (2, 1, 2, 1), strict=True))
    assert gaps(rows.values()) == [
        Gap("deletion", CONSTANT, {"b": 1}),
        Gap("deletion", UNTOLD, {"a": 1}),
        Gap("iou", EMPTY, {"b": 2, "a": 1}),
        Gap("iou", UNTOLD, {"a": 1}),
    ]


def test_a_runs_leaderboard_has_the_methods_as_its_config_has_them(store: Store) -> None:
    results = committed(store, UNITS)
    run = RunRecord("run", "run", {}, {}, tables={"method_info": [{"method": "b"}, {"method": "a"}]})
    store.runs.write(run.with_keys({record.unit: record.key for _, record in results.members}))
    assert [row.method for row in leaderboard(store, "run")] == ["b", "b", "a", "a"]
    store.runs.write(replace(store.runs.read("run"), tables={"method_info": [{"method": "a"}, {"method": "b"}]}))
    assert [row.method for row in leaderboard(store, "run")] == ["a", "a", "b", "b"]


def test_a_metric_that_a_method_has_no_rows_of_is_no_standing(store: Store) -> None:
    found = standings(committed(store, {("a", 0): [(0, "iou", 1.0, None)], ("b", 0): [(0, "gini", 1.0, None)]}))
    assert [(row.method, row.metric) for row in found] == [("a", "iou"), ("b", "gini")]


def test_markdown_has_a_table_for_each_family_and_tells_the_reasons(store: Store) -> None:
    text = leaderboard_markdown(standings(committed(store, UNITS)))
    order = ["### Perturbation", "| method | deletion ↓ |", "### Localisation", "| method | iou ↑ |"]
    assert [text.index(one) for one in order] == sorted(text.index(one) for one in order)
    assert "- iou: the mask is empty: b 2, a 1\n" in text
    assert "- deletion: the map is constant: b 1\n" in text


def twin(values: np.ndarray) -> Iterator[tuple[int, int, int, list[float]]]:
    """Every pair of columns on the rows that both have, by the bootstrap of a single column."""
    for first in range(values.shape[1]):
        for second in range(first + 1, values.shape[1]):
            gap = values[:, first] - values[:, second]
            numbers = [float(one[0]) for one in bootstrap_means(gap[:, None])]
            yield first, second, int((~np.isnan(gap)).sum()), numbers


def with_gaps(seed: int, images: int, columns: int) -> np.ndarray:
    """Values with rows that nobody has, single gaps, two columns of the same gaps and one without a value."""
    generator = np.random.default_rng(seed)
    values = generator.gamma(2.0, size=(images, columns))
    values[generator.random(images) < 0.2] = np.nan
    values[generator.random((images, columns)) < 0.1] = np.nan
    values[np.isnan(values[:, 0]), 1] = values[np.isnan(values[:, 1]), 0] = np.nan
    values[:, -1] = np.nan
    return values


def assert_same(pairs: PairedMeans, values: np.ndarray) -> None:
    expected = list(twin(values))
    assert list(zip(pairs.first, pairs.second, pairs.count, strict=True)) == [one[:3] for one in expected]
    found = np.stack([pairs.mean, pairs.low, pairs.high], axis=1)
    np.testing.assert_allclose(found, [one[3] for one in expected], atol=1e-12)


def test_paired_differences_are_bootstrapped_over_the_images_that_both_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = [with_gaps(seed, 30, columns) for seed, columns in enumerate((5, 2, 4))]
    for pairs, values in zip(bootstrap_differences(blocks), blocks, strict=True):
        assert_same(pairs, values)
    # In small portions of blocks and of resamples: the same images are drawn in the same order.
    monkeypatch.setattr("tasks.bootstrap.HELD_AT_ONCE", 999)
    for pairs, values in zip(bootstrap_differences(blocks), blocks, strict=True):
        assert_same(pairs, values)


def test_a_paired_interval_is_that_of_scipy() -> None:
    generator = np.random.default_rng(5)
    easy = generator.normal(size=(80, 1))
    values = easy + generator.normal([0.0, 0.1], 0.2, size=(80, 2))
    (pairs,) = bootstrap_differences([values], resamples=9999)
    wanted = scipy.stats.bootstrap(
        (values[:, 0] - values[:, 1],),
        np.mean,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = wanted.high - wanted.low
    assert (pairs.low[0], pairs.high[0]) == pytest.approx((wanted.low, wanted.high), abs=0.03 * width)
    # What is common to both methods is gone: each mean alone is far less certain.
    _, low, high = bootstrap_means(values)
    assert width < 0.5 * (high[0] - low[0])


def measured(**values: list[list[float]]) -> Measurements:
    """Values of two methods or more by metric, ``[images][methods]``."""
    arrays = {metric: np.array(rows) for metric, rows in values.items()}
    count = next(iter(arrays.values())).shape[1]
    return Measurements(tuple("abcdef"[:count]), tuple(arrays), arrays, {})


def test_who_is_better_follows_the_direction() -> None:
    nan = math.nan
    found = paired_differences(
        measured(
            insertion=[[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]],
            deletion=[[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]],
            aopc=[[0.9, 0.1], [0.1, 0.9], [0.5, 0.6]],
            gini=[[0.5, nan], [nan, 0.4], [0.5, 0.2]],
            entropy=[[0.5, nan], [nan, 0.4], [nan, 0.2]],
            retired=[[0.9, 0.1], [0.8, 0.3], [0.7, 0.2]],
        )
    )
    assert [(one.metric, one.winner, one.told_apart, one.count) for one in found] == [
        ("insertion", "a", True, 3),
        ("deletion", "b", True, 3),
        ("aopc", None, False, 3),
        ("gini", None, False, 1),
        ("entropy", None, False, 0),
        ("retired", None, True, 3),
    ]
    assert found[0].mean == pytest.approx(0.6)
    assert (found[3].mean, found[3].low, found[3].high) == (pytest.approx(0.3), None, None)
    assert found[4].mean is None
    assert paired_differences(measured(insertion=[[0.9], [0.8]])) == []


def test_a_difference_seen_from_the_other_side() -> None:
    one = Difference("insertion", "a", "b", 9, 0.2, -0.1, 0.4, True)
    other = one.seen_from("b")
    assert (other.first, other.second, other.mean, other.low, other.high) == ("b", "a", -0.2, -0.4, 0.1)
    assert one.seen_from("a") is one
    assert Difference("insertion", "a", "b", 1, 0.5, None, None, True).seen_from("b").low is None


def test_duels_count_metrics_both_ways_round() -> None:
    rows = [[0.9, 0.1, 0.5], [0.8, 0.3, 0.6], [0.7, 0.2, 0.1]]
    found = duels(paired_differences(measured(insertion=rows, deletion=rows, aopc=rows, retired=rows)))
    assert len(found) == 6
    assert (found["a", "b"].better, found["a", "b"].worse, found["a", "b"].metrics) == (2, 1, 3)
    assert (found["b", "a"].better, found["b", "a"].worse) == (1, 2)
    assert (found["b", "c"].better, found["b", "c"].worse) == (0, 0)
