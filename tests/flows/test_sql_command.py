"""``vitrine sql``: options, formats and files, mostly through the real command."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.sql_command import SHOWN_ROWS, write_rows
from storage.errors import QueryError
from storage.store import open_store
from tests.flows.command import VITRINE, call, vitrine
from tests.storage.writing import commit, run_of

EVERY_KIND = """
select
    1::bigint as integer, 2::hugeint as large, 0.5 as tenths, 0.25::double as number, 'nan'::double as nan,
    'inf'::double as infinite, null::double as missing, true as truth, 'a "b"' as text, date '2024-02-03' as day,
    timestamptz '2024-02-03 04:05:06+00' as moment, timestamp '2024-02-03 04:05:06.5' as naive,
    time '07:08' as clock
"""
NESTED = (
    "select [1, null] as list, {'a': 'nan'::float, 'b': [0.5]} as struct, map {'k': 1} as map, 'xy'::blob as bytes"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a store of two runs."""
    folder = tmp_path_factory.mktemp("sql")
    store = open_store(folder / "vitrine-store", create=True)
    first, second = commit(store, 0), commit(store, 1)
    run_of(store, "one-1", [first])
    run_of(store, "two-2", [first, second])
    return folder


def rows_of(place: Path, text: str, *options: str) -> Any:
    found = call("sql", text, "--format", "json", *options, cwd=place)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_json_holds_every_kind_of_value(place: Path) -> None:
    assert rows_of(place, EVERY_KIND) == [
        {
            "integer": 1,
            "large": 2,
            "tenths": 0.5,
            "number": 0.25,
            "nan": None,
            "infinite": None,
            "missing": None,
            "truth": True,
            "text": 'a "b"',
            "day": "2024-02-03",
            "moment": "2024-02-03T04:05:06+00:00",
            "naive": "2024-02-03T04:05:06.500000",
            "clock": "07:08:00",
        }
    ]
    assert rows_of(place, NESTED) == [
        {"list": [1, None], "struct": {"a": None, "b": [0.5]}, "map": [["k", 1]], "bytes": "7879"}
    ]


def test_json_of_no_rows_is_an_empty_list(place: Path) -> None:
    assert rows_of(place, "from metrics where false") == []


def test_csv_and_parquet_hold_the_same_rows(place: Path) -> None:
    text = "select image_id, method, value from metrics where run_id = 'two-2' order by all"
    expected = rows_of(place, text)
    assert len(expected) == 8
    told = call("sql", text, "--format", "csv", cwd=place).stdout
    assert [
        {"image_id": int(row["image_id"]), "method": row["method"], "value": float(row["value"])}
        for row in csv.DictReader(io.StringIO(told))
    ] == expected
    done = vitrine("sql", text, "-o", "rows.parquet", cwd=place)
    assert (done.returncode, done.stdout) == (0, "")
    assert pq.read_table(place / "rows.parquet").to_pylist() == expected


@pytest.mark.parametrize(
    ("output", "options", "opening"),
    [
        ("a.csv", (), b'"n"\n'),
        ("a.json", (), b"["),
        ("a.PARQUET", (), b"PAR1"),
        ("a.txt", (), b"n"),
        ("a", (), b"n"),
        ("b.csv", ("--format", "json"), b"["),
    ],
)
def test_the_suffix_names_the_format_unless_it_is_given(
    place: Path, output: str, options: tuple[str, ...], opening: bytes
) -> None:
    assert call("sql", "select 1 as n", "-o", output, *options, cwd=place).returncode == 0
    assert (place / output).read_bytes().startswith(opening)


def test_parquet_goes_through_a_pipe(place: Path) -> None:
    done = subprocess.run(
        [VITRINE, "sql", "select 7 as n", "--format", "parquet"], cwd=place, stdout=subprocess.PIPE, check=True
    )
    assert pq.read_table(io.BytesIO(done.stdout)).to_pylist() == [{"n": 7}]


def test_runs_limit_what_is_asked(place: Path) -> None:
    text = "select run_id, count(*) as n from metrics group by all order by all"
    assert rows_of(place, text) == [{"run_id": "one-1", "n": 4}, {"run_id": "two-2", "n": 8}]
    assert rows_of(place, text, "--run", "one-1") == [{"run_id": "one-1", "n": 4}]
    assert len(rows_of(place, text, "--run", "one-1", "--run", "two-2")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "QUERY: expected a query or --tables, got neither; `vitrine sql --tables` lists"),
        (("select 1", "--tables"), "expected a query or --tables, got both"),
        (
            ("select 1", "--run", "one-2"),
            "expected a run of vitrine-store, got 'one-2'; did you mean 'one-1'",
        ),
        (("select 1", "--memory", "much"), "--memory: expected a size such as 512MB or 2GiB, got 'much'"),
        (("select 1", "--timeout", "0"), "--timeout: expected seconds above 0, got 0"),
        (("select 1", "--threads", "0"), "--threads: expected at least 1, got 0"),
        (("select 1", "-o", "no/such.csv"), "-o: expected a file in a folder that exists, got no/such.csv"),
        (("select 1", "-o", "."), "-o: expected a file in a folder that exists, got ."),
        (("select sum(sin(range)) from range(1000000000000)", "--timeout", "1"), "ran past 1 s"),
        (("select list(range) from range(100000000)", "--memory", "60MB"), "needs more memory than 60MB"),
        (("select [1]", "--format", "csv"), "--format csv: Unsupported Type"),
        (("select interval 1 day", "--format", "parquet"), "--format parquet: .*cast that column to text"),
        (
            ("select 'infinity'::date as d", "--format", "json"),
            "a value cannot be shown .*; cast that column",
        ),
    ],
)
def test_bad_usage_says_what_was_expected(place: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(place.iterdir())
    found = call("sql", *arguments, cwd=place)
    assert found.returncode == 2
    assert re.search(message, found.stderr), found.stderr
    assert found.stdout == ""
    assert sorted(place.iterdir()) == before


def test_tables_lists_everything_without_a_store(tmp_path: Path) -> None:
    found = call("sql", "--tables", "--format", "json", cwd=tmp_path)
    told = {one["name"]: one for one in json.loads(found.stdout)}
    assert told["leaderboard"]["kind"] == "view"
    assert {"name": "value", "type": "DOUBLE"} in told["metrics"]["columns"]
    assert all(one["description"] for one in told.values())
    listed = call("sql", "--tables", cwd=tmp_path).stdout
    assert all(name in listed for name in told)
    assert call("sql", "--tables", "-o", "tables.csv", cwd=tmp_path).returncode == 0
    assert len((tmp_path / "tables.csv").read_text().splitlines()) == len(told) + 1


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_a_reader_that_goes_away_ends_it_quietly(place: Path, format: str) -> None:
    command = [VITRINE, "sql", "select range, repeat('x', 99) from range(900)", "--format", format]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(), said) == (0, b"")


ROWS = pa.table({"n": list(range(SHOWN_ROWS + 1))})


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("what was here before")
    with pytest.raises(QueryError, match="--format csv"):
        write_rows(pa.table({"a": [1], "list": [[1]]}), "csv", path)
    assert path.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [path]
    write_rows(ROWS, None, path)
    assert len(path.read_text().splitlines()) == SHOWN_ROWS + 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_pointing_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "far" / "rows.csv")
    write_rows(ROWS, None, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "far" / "rows.csv").read_text().startswith('"n"\n0\n')


def test_a_pipe_or_a_device_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write_rows(pa.table({"n": [1]}), "csv", pipe)
        assert reader.stdout.read() == b'"n"\n1\n'
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_table_shows_its_first_rows_and_says_that_there_are_more(capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, "table", None)
    lines = capfd.readouterr().out.splitlines()
    assert f"{SHOWN_ROWS} of {SHOWN_ROWS + 1} rows; --format csv, json or parquet gives all" in lines[-1]
    assert sum(line.strip().isdigit() for line in lines) == SHOWN_ROWS


def test_text_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(pa.table({"path": ["\x1b[2J\x1b[31mred\x07", "[bold]plain[/bold]"]}), "table", None)
    shown = capfd.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert r"\x1b[2J\x1b[31mred\x07" in shown
    assert "[bold]plain[/bold]" in shown


def test_columns_of_one_name_all_arrive(place: Path) -> None:
    assert rows_of(place, "select 1 as a, 2 as a") == [{"a": 1, "a_1": 2}]
