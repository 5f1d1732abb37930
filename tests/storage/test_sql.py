"""SQL over a store: what it shows, and what it cannot be talked into."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from storage import sql
from storage.commits import Unit, key_of
from storage.errors import QueryError, StoreError
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.store import Store, open_store


def commit(store: Store, stage: str, shard: int, **tables: dict[str, list[Any]]) -> tuple[Unit, str]:
    unit = Unit(stage, "", shard)
    ingredients = {"stage": stage, "shard": shard}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    for name, columns in tables.items():
        writing.table(name, rows_to_table(name, columns))
    writing.finish({"images": 2, "ok": 2, "quarantined": 0})
    return unit, key_of(ingredients)


def manifest(*ids: int) -> dict[str, list[Any]]:
    return {
        "image_id": list(ids),
        "path": [f"{one}.png" for one in ids],
        "sha256": ["00"] * len(ids),
        "width": [4] * len(ids),
        "height": [3] * len(ids),
        "label": [None] * len(ids),
        "label_name": [None] * len(ids),
    }


def targets(*ids: int) -> dict[str, list[Any]]:
    count = len(ids)
    return {
        "image_id": list(ids),
        "target": [7] * count,
        "target_name": ["dog"] * count,
        "correct": [True] * count,
    }


def note_run(store: Store, run_id: str, *units: tuple[Unit, str], state: str = "complete") -> None:
    run = RunRecord(
        run_id, "study", {"name": "study"}, {"vitrine": "0.1"}, state, facts={"model": "vit", "images": 4}
    )
    store.runs.write(run.with_keys(dict(units)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs that share the first shard; the second has one more, and targets for the first only."""
    store = open_store(tmp_path / "store", create=True)
    first = commit(store, "manifest", 0, manifest=manifest(0, 1))
    second = commit(store, "manifest", 1, manifest=manifest(2, 3))
    target = commit(store, "predict", 0, targets=targets(0, 1))
    note_run(store, "small", first)
    note_run(store, "large", first, second, target)
    return store


def rows(store: Store, text: str, **limits: Any) -> list[dict[str, Any]]:
    return sql.query(store, text, **limits).to_pylist()


def test_a_shard_that_two_runs_share_shows_under_both(store: Store) -> None:
    found = rows(
        store, "select run_id, list(image_id order by image_id) as ids from manifest group by 1 order by 1"
    )
    assert found == [{"run_id": "large", "ids": [0, 1, 2, 3]}, {"run_id": "small", "ids": [0, 1]}]


def test_images_are_the_manifest_with_targets_of_the_same_run(store: Store) -> None:
    found = rows(store, "select run_id, image_id, target, correct from images order by all")
    assert [(row["run_id"], row["image_id"], row["target"]) for row in found] == [
        ("large", 0, 7),
        ("large", 1, 7),
        ("large", 2, None),
        ("large", 3, None),
        ("small", 0, None),
        ("small", 1, None),
    ]


def test_every_named_table_can_be_queried_and_has_a_run_id(store: Store) -> None:
    for name in sql.table_names():
        assert "run_id" in sql.query(store, f"select * from {name}").column_names


def test_a_query_can_be_limited_to_some_runs(store: Store) -> None:
    assert rows(store, "select distinct run_id from manifest", run_ids=["small"]) == [{"run_id": "small"}]
    assert rows(store, "select run_id from runs", run_ids=iter(["small"])) == [{"run_id": "small"}]


def test_the_rows_of_a_damaged_commit_are_not_shown(store: Store) -> None:
    units = store.runs.read("large").units()
    record = store.done(Unit("manifest", "", 1), units[Unit("manifest", "", 1)])
    (store.root / record.objects[0].path).unlink()
    assert rows(store, "select count(*) as n from manifest where run_id = 'large'") == [{"n": 2}]


def test_runs_tell_state_model_and_images(store: Store) -> None:
    (found,) = rows(store, "select state, model, images, vitrine_version from runs where run_id = 'small'")
    assert found == {"state": "complete", "model": "vit", "images": 4, "vitrine_version": "0.1"}


def test_an_empty_store_answers(tmp_path: Path) -> None:
    assert rows(open_store(tmp_path / "new", create=True), "select count(*) as n from metrics") == [{"n": 0}]


def test_a_wrong_query_names_the_tables(store: Store) -> None:
    with pytest.raises(QueryError, match=r"the tables are: best_method_per_image, cafe, concept_curves, "):
        sql.query(store, "select * from metricks")


def test_a_query_that_runs_too_long_is_stopped(store: Store) -> None:
    endless = "select count(*) from range(1000000) a, range(1000000) b where hash(a.range, b.range) = 7"
    with pytest.raises(QueryError, match=r"ran past 0\.5 s and was stopped"):
        sql.query(store, endless, timeout=0.5)


def test_a_query_asked_for_one_run_reads_no_other(store: Store) -> None:
    """The second shard belongs to the large run alone; without its file the small one can still be asked."""
    units = store.runs.read("large").units()
    record = store.done(Unit("manifest", "", 1), units[Unit("manifest", "", 1)])
    connection = sql.connect(store)
    (store.root / record.objects[0].path).unlink()
    text = "select count(*) from manifest where run_id = "
    assert connection.execute(text + "'small'").fetchall() == [(2,)]
    with pytest.raises(duckdb.Error):
        connection.execute(text + "'large'").fetchall()


@pytest.mark.parametrize(
    "text",
    [
        "from manifest",
        "with m as (from manifest) select * from m",
        "values (1), (2)",
        "describe manifest",
        "summarize manifest",
        "show tables",
        "explain from manifest",
        "explain analyze from manifest",
        "pivot manifest on path using count(*)",
        "unpivot (select 1 as a, 2 as b) on a, b",
        "select 1;",
    ],
)
def test_whatever_returns_rows_and_changes_nothing_is_answered(store: Store, text: str) -> None:
    assert sql.query(store, text).num_rows > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("create temp table t as select 1", "got CREATE: a query cannot change the store"),
        ("select 1; select 2", "expected one statement, got 2"),
        ("", "expected one statement, got 0"),
        ("connect 'other'", "got another: a query cannot change the store"),
        ("select '\udc80'", "expected a query in UTF-8"),
        ("selec 1", "syntax error"),
    ],
)
def test_anything_else_is_refused_with_the_reason(store: Store, text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        sql.query(store, text)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"timeout": 0.0}, "--timeout: expected seconds above 0, got 0"),
        ({"timeout": float("nan")}, "--timeout: expected seconds above 0, got nan"),
        ({"timeout": float("inf")}, "--timeout: expected seconds above 0, got inf"),
        ({"threads": 0}, "--threads: expected at least 1, got 0"),
        ({"memory_limit": "lots"}, "--memory: expected a size such as 512MB or 2GiB, got 'lots'"),
        ({"memory_limit": "0MB"}, "--memory: expected a size"),
        ({"memory_limit": "1GB'; select 1; --"}, "--memory: expected a size"),
    ],
)
def test_limits_that_make_no_sense_are_refused(store: Store, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        sql.query(store, "select 1", **limits)


def test_limits_reach_the_database(store: Store) -> None:
    text = "select current_setting('memory_limit') as memory, current_setting('threads') as threads"
    assert rows(store, text, memory_limit="1.5GiB", threads=1) == [{"memory": "1.5 GiB", "threads": 1}]


def test_opening_counts_as_time_of_the_query(store: Store) -> None:
    with pytest.raises(QueryError, match=r"opening the store took .* raise --timeout or name one run"):
        sql.query(store, "select 1", timeout=1e-6)


def test_columns_of_one_name_are_numbered(store: Store) -> None:
    text = "select 1 as a, 2 as a, 3 as b, 4 as a"
    assert rows(store, text) == [{"a": 1, "a_1": 2, "b": 3, "a_2": 4}]
    assert rows(store, "select 1 as a, 2 as a, 3 as a_1") == [{"a": 1, "a_2": 2, "a_1": 3}]


def test_times_are_told_in_utc_wherever_the_reader_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        table = sql.query(store, "select timestamptz '2024-01-01 12:00:00+00' as noon, created from runs")
        (text,) = {row["t"] for row in rows(store, "select (timestamptz '2024-01-01 12:00:00+00')::varchar as t")}
    finally:
        monkeypatch.undo()
        time.tzset()
    assert table.schema.field("noon").type == pa.timestamp("us", tz="UTC")
    assert text == "2024-01-01 12:00:00+00"


def test_a_damaged_file_is_the_stores_fault_not_the_querys(store: Store) -> None:
    path = next((store.root / "tables" / "manifest").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"a file is damaged, or was removed .*: see `vitrine verify`"):
        sql.query(store, "from manifest")


def test_the_catalogue_tells_every_table_and_view_with_its_columns(store: Store) -> None:
    told = {one.name: one for one in sql.catalogue()}
    assert sorted(told) == sql.table_names()
    assert {one.name for one in told.values() if one.kind == "view"} == {
        "images",
        "leaderboard",
        "paired_differences",
        "best_method_per_image",
        "disagreements",
        "worst_images",
    }
    for name, one in told.items():
        assert one.description
        assert list(one.columns) == sql.query(store, f"select * from {name}").column_names
    assert told["metrics"].columns["value"] == "DOUBLE"
