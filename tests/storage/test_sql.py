"""SQL over a store: what it shows, and what it cannot be talked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage import sql
from storage.commits import Unit, key_of
from storage.errors import QueryError
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


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


FORBIDDEN = [
    "copy (select 1) to '{target}'",
    "copy manifest to '{committed}' (format parquet)",
    "copy manifest to '{folder}' (format parquet, partition_by (label))",
    "export database '{folder}'",
    "import database '{folder}'",
    "attach '{target}' as other",
    "attach '{target}' as other (read_only)",
    "select * from read_text('{secret}')",
    "select * from read_blob('{secret}')",
    "select * from read_csv('{secret}')",
    "select * from read_json('{secret}')",
    "select * from read_parquet('{committed}')",
    "select * from '{committed}'",
    "select * from glob('{folder}/*')",
    "select * from parquet_metadata('{committed}')",
    "create table t as select * from read_csv('{secret}')",
    "set enable_external_access = true",
    "set memory_limit = '100GB'",
    "set lock_configuration = false",
    "reset enable_external_access",
    "set temp_directory = '{folder}'",
    "pragma memory_limit = '100GB'",
    "pragma enable_profiling = 'json'",
    "set profiling_output = '{target}'",
    "install httpfs",
    "load httpfs",
    "load '{secret}'",
    "set allowed_directories = ['/']",
    "create secret s (type s3)",
    "call enable_logging()",
    "select 1; copy (select 1) to '{target}'",
    "select getenv('HOME')",
    "from query('copy (select 1) to ''{target}''')",
]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_a_query_can_neither_read_nor_write_files_nor_change_settings(
    store: Store, tmp_path: Path, text: str
) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nswordfish\n")
    committed = next((store.root / "tables" / "manifest").iterdir())
    before = snapshot(tmp_path)
    filled = text.format(target=tmp_path / "out", committed=committed, folder=tmp_path / "store", secret=secret)
    with pytest.raises(QueryError):
        sql.query(store, filled)
    assert snapshot(tmp_path) == before


def test_a_wrong_query_names_the_tables(store: Store) -> None:
    with pytest.raises(QueryError, match=r"the tables are: concepts, curves, images"):
        sql.query(store, "select * from metricks")


def test_a_query_that_runs_too_long_is_stopped(store: Store) -> None:
    endless = "select count(*) from range(1000000) a, range(1000000) b where hash(a.range, b.range) = 7"
    with pytest.raises(QueryError, match=r"ran past 0\.5 s and was stopped"):
        sql.query(store, endless, timeout=0.5)


def test_a_statement_without_rows_gives_an_empty_table(store: Store) -> None:
    assert sql.query(store, "create temp table t as select 1").num_rows in (0, 1)
