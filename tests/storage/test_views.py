"""The views, each against a slow twin in plain Python, on values with ties and gaps and metrics of every kind."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from storage import sql
from storage.commits import Unit, key_of
from storage.runs import RunRecord
from storage.schema import TABLES, rows_to_table
from storage.store import Store, open_store
from storage.views import DESCRIPTIONS, UNTOLD, VIEWS

# ``unknown`` is measured but not described: a run of an older version may lack it.
DIRECTIONS = {"up": True, "down": False, "sideways": None}
METRICS = (*DIRECTIONS, "unknown")
METHODS = ("m1", "m2", "m[a, b]")
REASONS = ("the map is constant", "the mask is empty", None)
VALUES = (0.0, 0.25, 0.25, 0.5, 1.0, None, math.nan, math.inf)
IMAGES = 24

Rows = list[dict[str, Any]]


def metric_rows(run_id: str, images: int = IMAGES) -> Rows:
    """Every method and metric on every image; in the last two images nothing but ties, and nothing defined."""
    draw = random.Random(run_id)
    rows = [
        {"image_id": image, "method": method, "metric": metric, "value": draw.choice(VALUES)}
        for image in range(images)
        for method in METHODS
        for metric in METRICS
    ]
    for row in rows:
        if row["image_id"] >= images - 2:
            row["value"] = 0.5 if row["image_id"] == images - 1 else None
        if row["value"] is None:
            row["reason"] = REASONS[row["image_id"] % 3]
    return rows


def commit(store: Store, stage: str, salt: str, table: str, rows: Rows) -> tuple[Unit, str]:
    unit, ingredients = Unit(stage), {"stage": stage, "salt": salt}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    writing.table(
        table, rows_to_table(table, {name: [row.get(name) for row in rows] for name in TABLES[table].names})
    )
    writing.finish({"images": len(rows), "ok": len(rows), "quarantined": 0})
    return unit, key_of(ingredients)


def write_run(store: Store, run_id: str, rows: Rows, directions: dict[str, bool | None] = DIRECTIONS) -> None:
    ids = sorted({row["image_id"] for row in rows})
    manifest = [
        {"image_id": one, "path": f"{run_id}/{one}.png", "sha256": "", "width": 1, "height": 1}
        | {"label": one % 3, "label_name": f"class {one % 3}"}
        for one in ids
    ]
    targets = [{"image_id": one, "target": 0, "target_name": "class 0", "correct": one % 3 == 0} for one in ids]
    units = [
        commit(store, "manifest", run_id, "manifest", manifest),
        commit(store, "predict", run_id, "targets", targets),
        commit(store, "metrics", run_id, "metrics", rows),
    ]
    info = [
        {"metric": metric, "higher_is_better": higher, "lower_bound": None, "upper_bound": None}
        | {"definition": "", "undefined": "", "paper": ""}
        for metric, higher in directions.items()
    ]
    run = RunRecord(run_id, run_id, {}, {}, "complete", tables={"metric_info": info})
    store.runs.write(run.with_keys(dict(units)))


RUNS = {run_id: metric_rows(run_id) for run_id in ("first", "second")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(tmp_path_factory.mktemp("views") / "store", create=True)
    for run_id, rows in RUNS.items():
        write_run(store, run_id, rows)
    return store


def ask(store: Store, text: str) -> Rows:
    return sql.query(store, text).to_pylist()


def defined(rows: Iterable[dict[str, Any]]) -> list[float]:
    return [row["value"] for row in rows if row["value"] is not None and math.isfinite(row["value"])]


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def better(metric: str, value: float) -> float:
    return value if DIRECTIONS[metric] else -value


def twin_reasons(missing: Iterable[dict[str, Any]]) -> str | None:
    counts = Counter(row.get("reason") or UNTOLD for row in missing)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{reason}: {count}" for reason, count in by_count) or None


def twin_leaderboard(rows: Rows) -> Rows:
    board = []
    for (method, metric), members in grouped(rows, "method", "metric").items():
        values = defined(members)
        board.append(
            {
                "method": method,
                "metric": metric,
                "mean": statistics.fmean(values) if values else None,
                "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
                "images": len(values),
                "nulls": len(members) - len(values),
                "reasons": twin_reasons(row for row in members if not defined([row])),
                "higher_is_better": DIRECTIONS.get(metric),
            }
        )
    for one in board:
        rivals = [r for r in board if r["metric"] == one["metric"] and r["mean"] is not None]
        ranked = one["mean"] is not None and one["higher_is_better"] is not None
        ahead = [r for r in rivals if ranked and better(r["metric"], r["mean"] - one["mean"]) > 1e-9]
        one["rank"] = 1 + len(ahead) if ranked else None
    return board


@pytest.mark.parametrize("run_id", RUNS)
def test_the_leaderboard(store: Store, run_id: str) -> None:
    found = ask(store, f"select * exclude (run_id) from leaderboard where run_id = '{run_id}'")
    expected = grouped(twin_leaderboard(RUNS[run_id]), "method", "metric")
    assert len(found) == len(expected)
    for row in found:
        (twin,) = expected[row["method"], row["metric"]]
        assert row == {name: pytest.approx(value) for name, value in twin.items()}


def twin_differences(rows: Rows) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    found: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    value = {(row["metric"], row["image_id"], row["method"]): row["value"] for row in rows if defined([row])}
    for metric in METRICS:
        for first in METHODS:
            for second in METHODS:
                gaps = [
                    value[metric, image, first] - value[metric, image, second]
                    for image in range(IMAGES)
                    if (metric, image, first) in value and (metric, image, second) in value
                ]
                if first == second or not gaps:
                    continue
                error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
                found[metric, first, second] = (len(gaps), statistics.fmean(gaps), error)
    return found


@pytest.mark.parametrize("run_id", RUNS)
def test_the_paired_differences(store: Store, run_id: str) -> None:
    found = ask(store, f"select * from paired_differences where run_id = '{run_id}'")
    twin = twin_differences(RUNS[run_id])
    assert {(row["metric"], row["method_a"], row["method_b"]) for row in found} == twin.keys()
    assert len(found) == len(twin)
    for row in found:
        images, mean, error = twin[row["metric"], row["method_a"], row["method_b"]]
        assert row["images"] == images
        assert (row["mean_difference"], row["standard_error"]) == pytest.approx((mean, error))
        assert (row["low"], row["high"]) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error))
        assert row["higher_is_better"] == DIRECTIONS.get(row["metric"])
        assert row["winner"] is None or row["higher_is_better"] is not None


def test_the_winner_of_a_pair_follows_the_direction_and_the_interval(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    values = {
        "apart": {"m1": [0.5, 0.6, 0.7], "m2": [0.1, 0.2, 0.2]},
        "close": {"m1": [0.5, 0.1, 0.7], "m2": [0.4, 0.6, 0.2]},
        "equal": {"m1": [0.5, 0.5, 0.5], "m2": [0.5, 0.5, 0.5]},
        "single": {"m1": [0.5, None, 0.5], "m2": [None, None, 0.1]},
        "apart_by_distance": {"m1": [1.0, 2.0, 2.0], "m2": [1.5, 2.6, 2.4]},
    }
    rows = [
        {"image_id": image, "method": method, "metric": metric, "value": value}
        for metric, methods in values.items()
        for method, of_images in methods.items()
        for image, value in enumerate(of_images)
    ]
    directions = {**dict.fromkeys(values, True), "apart_by_distance": False}
    write_run(store, "duel", rows, directions)
    found = ask(store, "select metric, method_a, images, winner, standard_error from paired_differences")
    assert {(row["metric"], row["winner"]) for row in found} == {
        ("apart", "m1"),
        ("close", None),
        ("equal", None),
        ("single", None),
        ("apart_by_distance", "m1"),
    }
    assert {row["metric"]: row["images"] for row in found} == {**dict.fromkeys(values, 3), "single": 1}
    assert all(row["standard_error"] is None for row in found if row["metric"] == "single")


def twin_best(rows: Rows) -> set[tuple[Any, ...]]:
    best = set()
    for (metric, image), members in grouped(rows, "metric", "image_id").items():
        if DIRECTIONS.get(metric) is None or not (values := defined(members)):
            continue
        top = max(better(metric, value) for value in values)
        winners = [row for row in members if defined([row]) and better(metric, row["value"]) == top]
        best |= {(metric, image, one["method"], one["value"], len(values), len(winners)) for one in winners}
    return best


@pytest.mark.parametrize("run_id", RUNS)
def test_the_best_method_per_image(store: Store, run_id: str) -> None:
    found = ask(store, f"select * from best_method_per_image where run_id = '{run_id}'")
    columns = ("metric", "image_id", "method", "value", "methods", "tied")
    assert {tuple(row[name] for name in columns) for row in found} == twin_best(RUNS[run_id])
    assert len(found) == len(twin_best(RUNS[run_id]))
    assert all(row["path"] == f"{run_id}/{row['image_id']}.png" for row in found)
    assert {row["tied"] for row in found} == {1, 2, 3}


def twin_disagreements(rows: Rows, leaders: dict[str, list[str]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    found = {}
    for (metric, image), members in grouped(rows, "metric", "image_id").items():
        known = [row for row in members if defined([row])]
        if DIRECTIONS.get(metric) is None or len({row["value"] for row in known}) < 2:
            continue
        by_merit = sorted(known, key=lambda row: better(row["metric"], row["value"]))
        low, high = by_merit[0]["value"], by_merit[-1]["value"]
        best = {row["method"] for row in known if row["value"] == high}
        worst = {row["method"] for row in known if row["value"] == low}
        agrees = bool(best & set(leaders[metric]))
        shown_best = min(best & set(leaders[metric])) if agrees else min(best)
        shown_worst = min(worst - set(leaders[metric]) or worst)
        found[metric, image] = (shown_best, high, shown_worst, low, abs(high - low), not agrees)
    return found


@pytest.mark.parametrize("run_id", RUNS)
def test_the_disagreements(store: Store, run_id: str) -> None:
    found = ask(store, f"select * from disagreements where run_id = '{run_id}'")
    leaders: dict[str, list[str]] = defaultdict(list)
    for row in twin_leaderboard(RUNS[run_id]):
        if row["rank"] == 1:
            leaders[row["metric"]].append(row["method"])
    expected = twin_disagreements(RUNS[run_id], leaders)
    columns = ("best_method", "best_value", "worst_method", "worst_value", "gap", "leader_differs")
    assert {(row["metric"], row["image_id"]): tuple(row[name] for name in columns) for row in found} == expected
    for metric, members in grouped(found, "metric").items():
        by_gap = sorted(members, key=lambda row: (-row["gap"], row["image_id"]))
        assert [row["place"] for row in by_gap] == list(range(1, len(members) + 1))
        assert {row["leader"] for row in members} == {" | ".join(sorted(leaders[metric[0]]))}
    assert {row["leader_differs"] for row in found} == {True, False}


@pytest.mark.parametrize("run_id", RUNS)
def test_the_worst_images(store: Store, run_id: str) -> None:
    found = grouped(ask(store, f"select * from worst_images where run_id = '{run_id}'"), "method", "metric")
    assert found.keys() == {(method, metric) for method in METHODS for metric in ("up", "down")}
    for (method, metric), rows in found.items():
        known = [r for r in RUNS[run_id] if (r["method"], r["metric"]) == (method, metric) and defined([r])]
        twin = sorted(known, key=lambda row: (better(metric, row["value"]), row["image_id"]))
        assert [(row["place"], row["image_id"], row["value"]) for row in rows] == [
            (place, row["image_id"], row["value"]) for place, row in enumerate(twin, start=1)
        ]
        for row in rows:
            kind = row["image_id"] % 3
            assert row["path"] == f"{run_id}/{row['image_id']}.png"
            assert (row["label"], row["label_name"]) == (kind, f"class {kind}")
            assert (row["target"], row["target_name"], row["correct"]) == (0, "class 0", kind == 0)


def test_at_most_a_hundred_worst_images_each(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    write_run(store, "many", metric_rows("many", images=400))
    found = ask(store, "select method, metric, count(*) as n, max(place) as last from worst_images group by all")
    assert len(found) == 6
    assert all((row["n"], row["last"]) == (100, 100) for row in found)


def test_means_that_differ_by_the_order_of_their_sums_tie(tmp_path: Path) -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 are different numbers in floating point."""
    store = open_store(tmp_path / "store", create=True)
    values = [0.1, 0.2, 0.3] * 50 + [1e-9] * 7
    rows = [
        {"image_id": image, "method": method, "metric": "up", "value": value}
        for method, ordered in (("forward", values), ("backward", values[::-1]))
        for image, value in enumerate(ordered)
    ]
    write_run(store, "tie", rows)
    assert {row["rank"] for row in ask(store, "from leaderboard")} == {1}


def test_a_value_too_large_for_single_precision_does_not_break_the_leaderboard(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    rows = [
        {"image_id": 0, "method": method, "metric": "up", "value": value}
        for method, value in (("a", 1e39), ("b", 1.0))
    ]
    write_run(store, "large", rows)
    found = {row["method"]: row["mean"] for row in ask(store, "from leaderboard")}
    assert found == {"a": 1e39, "b": 1.0}


def test_views_of_an_empty_store_are_empty(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    assert all(sql.query(store, f"from {view.name}").num_rows == 0 for view in VIEWS)


def test_every_table_is_described() -> None:
    assert DESCRIPTIONS.keys() == {*TABLES, "runs", "metric_info", "method_info"}
