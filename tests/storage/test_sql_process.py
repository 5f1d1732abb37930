"""A query in a process of its own: same answers and errors as inside, under limits that the system holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from storage import sql
from storage.errors import NoStoreError, QueryError, StoreError
from storage.sql_process import query_apart
from storage.store import Store, open_store
from tests.storage.writing import commit, run_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(tmp_path_factory.mktemp("apart") / "store", create=True)
    first, second = commit(store, 0), commit(store, 1)
    run_of(store, "one", [first])
    run_of(store, "two", [first, second])
    return store


@pytest.mark.parametrize(
    "text",
    [
        "from metrics order by all",
        "select * from metrics where false",
        "select 'nan'::double as nan, [1, null] as list, {'a': date '2024-01-01'} as struct, null as nothing",
        "select a.image_id, b.image_id from metrics a join metrics b using (run_id, image_id) order by all",
        "select range, repeat('x', 100) as text from range(100000)",
    ],
)
def test_rows_are_those_of_a_query_inside_this_process(store: Store, text: str) -> None:
    apart, inside = query_apart(store, text), sql.query(store, text)
    assert apart.schema == inside.schema
    assert repr(apart.to_pylist()) == repr(inside.to_pylist())


def test_runs_can_be_chosen(store: Store) -> None:
    found = query_apart(store, "select run_id, count(*) as n from metrics group by all", run_ids=["one"])
    assert found.to_pylist() == [{"run_id": "one", "n": 4}]


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("select nonsense", {}),
        ("from metricks", {}),
        ("drop view metrics", {}),
        ("select list(range) from range(100000000)", {"memory_limit": "60MB"}),
        ("select sum(sin(range)) from range(1000000000000)", {"timeout": 1.5}),
        ("select 1", {"threads": 0}),
    ],
)
def test_errors_are_those_of_a_query_inside_this_process(
    store: Store, text: str, limits: dict[str, float | str | int]
) -> None:
    with pytest.raises(QueryError) as inside:
        sql.query(store, text, **limits)
    with pytest.raises(QueryError) as apart:
        query_apart(store, text, **limits)
    assert str(apart.value) == str(inside.value)


def test_a_store_that_cannot_be_opened_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(NoStoreError, match="expected a store in"):
        query_apart(Store(tmp_path), "select 1")


def test_damage_is_the_same_error(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    record = commit(store, 0)
    run_of(store, "one", [record])
    path = next((store.root / "tables" / "metrics").iterdir())
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(StoreError, match="see `vitrine verify`"):
        query_apart(store, "from metrics")


# What a child under its limits can still do, told as JSON.
UNDER_LIMITS = """
import json, os, resource, sys
from storage.sql_process import Request, limit_this_process
limits = {"timeout": 1.0, "memory_limit": "100MB", "threads": 1}
limit_this_process(Request("", "", None, limits, 0.5))
told = {}
try:
    with open("written", "wb") as stream:
        stream.write(b"x")
except OSError as error:
    told["write"] = error.errno
try:
    bytearray(4 << 30)
except MemoryError:
    told["memory"] = "refused"
told["small"] = len(bytearray(100 << 20))
told["core"] = resource.getrlimit(resource.RLIMIT_CORE)
told["processor"] = resource.getrlimit(resource.RLIMIT_CPU)
sys.stdout.write(json.dumps(told))
sys.stdout.flush()
while True:
    pass
"""


def test_the_limits_of_the_process_hold(tmp_path: Path) -> None:
    """It writes no file, takes no 4 GiB, and a loop without end is ended by the system."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMITS], cwd=tmp_path, stdout=subprocess.PIPE, timeout=120, check=False
    )
    told = json.loads(done.stdout)
    assert told == {"write": 27, "memory": "refused", "small": 100 << 20, "core": [0, 0], "processor": [3, 3]}
    assert done.returncode < 0
    assert (tmp_path / "written").read_bytes() == b""


def test_a_child_that_dies_says_so(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that ends the interpreter at once stands for a crash."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(QueryError, match=r"the query's process was ended by SIGSEGV; narrow the query"):
        query_apart(store, "select 1")


def test_an_interpreter_that_ends_with_an_error_is_quoted(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "duckdb.py").write_text("raise ImportError('no database here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(QueryError, match=r"process ended with code 1 \(ImportError: no database here\)"):
        query_apart(store, "select 1")
