"""What people may try with SQL: nothing outside the store is read, nothing at all is written or changed.

Every text is given to ``query``, and to the locked connection alone, whose lock has to hold without the check of
the statement's kind. Where an attack says what it does, the same text on a connection that is not locked does it:
it reads the secret, writes a file, changes a setting, or changes what the connection shows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import sql
from storage.commits import CommitRecord, Unit, key_of
from storage.errors import QueryError
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.sql_process import query_apart
from storage.store import Store, open_store
from tests.flows.command import VITRINE

SECRET = "swordfish"
READS, WRITES, SETS, CHANGES = "reads", "writes", "sets", "changes"

# A variable of this process, which a replacement scan would find.
python_rows = pa.table({"word": [SECRET]})


@dataclass(frozen=True)
class Attack:
    """A text in which capital words stand for paths, and what it does where nothing is locked, if shown."""

    text: str
    does: str | None = None


def all_of(does: str | None, *texts: str) -> list[Attack]:
    return [Attack(text, does) for text in texts]


ATTACKS = [
    *all_of(
        READS,
        "select * from read_text('OUTSIDE/secret.csv')",
        "select content::varchar as content from read_blob('OUTSIDE/secret.csv')",
        "select * from read_csv('OUTSIDE/secret.csv')",
        "select * from read_csv_auto('OUTSIDE/*.csv')",
        "select * from read_csv(['OUTSIDE/secret.csv', 'OUTSIDE/secret.csv'], all_varchar = true)",
        "select * from read_json('OUTSIDE/secret.json')",
        "select * from read_json_objects('OUTSIDE/secret.json')",
        "select * from read_ndjson_objects('OUTSIDE/secret.json')",
        "select * from read_parquet('OUTSIDE/secret.parquet')",
        "select * from parquet_scan('OUTSIDE/secret.parquet')",
        "select decode(stats_min_value::blob) from parquet_metadata('OUTSIDE/secret.parquet')",
        "select key::varchar, value::varchar from parquet_kv_metadata('OUTSIDE/secret.parquet')",
        "select * from glob('OUTSIDE/*')",
        "select * from sniff_csv('OUTSIDE/secret.csv')",
        "from 'OUTSIDE/secret.csv'",
        'select * from "OUTSIDE/secret.parquet"',
        "from read_duckdb('OUTSIDE/secret.duckdb', table_name = 'word')",
        "from read_text('../outside/secret.csv')",
        "from read_text('file://OUTSIDE/secret.csv')",
        "from read_text('linked.csv')",
        "from read_parquet('STORE/tables/manifest/linked.parquet')",
        "from read_text('/proc/self/cwd/linked.csv')",
        "from query('from read_text(''OUTSIDE/secret.csv'')')",
        "from query_table('OUTSIDE/secret.csv')",
        "from json_execute_serialized_sql(json_serialize_sql('from read_text(''OUTSIDE/secret.csv'')'))",
        "with stolen as (from read_csv('OUTSIDE/secret.csv')) select * from manifest, stolen",
        "select (select max(word) from read_csv('OUTSIDE/secret.csv')) as word, * from manifest",
        "select * from manifest union all by name from 'OUTSIDE/secret.csv'",
        "summarize select * from read_csv('OUTSIDE/secret.csv')",
        "describe from 'OUTSIDE/secret.parquet'",
        "pivot (from 'OUTSIDE/secret.csv') on word using count(*)",
        "from python_rows",
        "select * from \"python_rows\" where word like 's%'",
        "create table stolen as from read_text('OUTSIDE/secret.csv'); from stolen",
        "create macro steal() as table from read_text('OUTSIDE/secret.csv'); from steal()",
        "create view stolen as from 'OUTSIDE/secret.csv'; from stolen",
        "prepare theft as from read_text('OUTSIDE/secret.csv'); execute theft",
        "attach 'OUTSIDE/secret.duckdb' as other (read_only); from other.word",
        "import database 'OUTSIDE/exported'; from imported",
        "create temp table stolen (word varchar); copy stolen from 'OUTSIDE/secret.csv'; from stolen",
    ),
    *all_of(
        WRITES,
        "copy (select 1) to 'OUTSIDE/new.csv'",
        "copy (select 1) to 'new.parquet' (format parquet)",
        "copy manifest to 'COMMITTED' (format parquet)",
        "copy manifest to 'COMMITTED' (format csv, use_tmp_file false)",
        "copy manifest to 'STORE/tables/manifest/new' (format parquet, partition_by (run_id))",
        "copy manifest to 'OUTSIDE/many' (format csv, per_thread_output true)",
        "copy manifest to 'STORE/vitrine.json' (format json)",
        "copy (select 1) to 'linked.csv'",
        "explain analyze copy (select 1) to 'OUTSIDE/new.csv'",
        "export database 'OUTSIDE/all'",
        "attach 'OUTSIDE/new.duckdb' as other; create table other.t as select 1; detach other",
        "attach 'OUTSIDE/secret.duckdb' as other; drop table other.word; detach other",
        "attach 'OUTSIDE/new.duckdb' as other; copy from database memory to other",
        "create persistent secret s (type http, bearer_token 'x')",
        "select 1; copy (select 1) to 'OUTSIDE/new.csv'",
        "/* select */ copy (select 1) to 'OUTSIDE/new.csv'; select 1",
        "prepare theft as copy (select 1) to 'OUTSIDE/new.csv'; execute theft",
        "call enable_logging('QueryLog', storage = 'file', storage_config = {'path': 'OUTSIDE/logs'}); select 1; "
        "call disable_logging()",
        "set log_query_path = 'OUTSIDE/queries.log'; select 1",
        "pragma enable_profiling = 'json'; set profiling_output = 'OUTSIDE/profile.json'; select 1",
        "set memory_limit = '40MB'; set threads = 1; set temp_directory = 'OUTSIDE/spill'; "
        "create table t as select range, repeat('x', 100) from range(500000) order by hash(range)",
    ),
    *all_of(
        SETS,
        "set enable_logging = true",
        "set memory_limit = '100GB'",
        "set global memory_limit = '100GB'",
        "pragma memory_limit = '100GB'",
        "set threads = 64",
        "set temp_directory = 'OUTSIDE'",
        "set allowed_directories = ['/']",
        "set allowed_paths = ['OUTSIDE/secret.csv']",
        "set allow_unsigned_extensions = false; set allow_community_extensions = false",
        "set extension_directories = ['OUTSIDE']",
        "set home_directory = 'OUTSIDE'",
        "set file_search_path = 'OUTSIDE'",
        "set python_scan_all_frames = true",
        "set custom_extension_repository = 'http://localhost:1'",
        "set http_proxy = 'http://localhost:1'",
        "set timezone = 'Asia/Tokyo'",
        "set max_expression_depth = 100000",
        "pragma enable_profiling",
        "pragma disable_optimizer",
    ),
    # On a connection that is not locked these have nothing to undo, or nothing to show for it.
    *all_of(
        None,
        "set enable_external_access = true",
        "set disabled_filesystems = 'LocalFileSystem'",
        "set secret_directory = 'OUTSIDE'",
        "reset threads",
        "reset enable_external_access",
        "set lock_configuration = false",
        "reset lock_configuration",
        "pragma lock_configuration = false",
        "set session lock_configuration = false",
        "set autoinstall_known_extensions = true",
        "set autoload_known_extensions = true",
        "set allow_persistent_secrets = true",
        "set python_enable_replacements = true",
    ),
    *all_of(
        CHANGES,
        "create table t as select 1",
        "create or replace view metrics as select 1 as value",
        "create or replace temp view metrics as select 1 as value",
        "drop view leaderboard",
        "drop view temp.metrics",
        "alter view leaderboard rename to losers",
        "create table runs as select 'forged' as run_id",
        "create macro sum(x) as 42",
        "create schema other",
        "create type mood as enum ('sad')",
        "create sequence s",
        "comment on view leaderboard is 'mine'",
        "set variable word = 'x'",
        "attach ':memory:' as other",
        "create secret s (type http, bearer_token 'x')",
    ),
    # Refused by any connection, or without an effect that could be seen.
    *all_of(
        None,
        "insert into metrics values ('r', 0, 'm', 'x', 1.0)",
        "with added as (insert into runs values ('r') returning *) from added",
        "with stolen as (copy (select 1) to 'OUTSIDE/new.csv') select 1",
        "delete from metrics",
        "update metrics set value = 1",
        "truncate metrics",
        "merge into metrics using (select 0 as image_id) s using (image_id) when matched then delete",
        "checkpoint",
        "force checkpoint",
        "vacuum",
        "vacuum analyze",
        "analyze",
        "begin; select 1; commit",
        "use temp",
        "detach memory",
        "call truncate_duckdb_logs()",
        "pragma force_checkpoint",
        "pragma enable_verification",
        "call sleep_ms(1)",
        "pragma import_database('OUTSIDE/exported')",
        "pragma add_parquet_key('k', '0123456789abcdef')",
        "select * from arrow_scan(0, 0, 0)",
        "select * from arrow_scan_dumb(0, 0, 0)",
        "select * from pandas_scan(0)",
        "select * from python_arrow_scan(0)",
        "select * from python_map_function((select 1))",
        "select getenv('HOME')",
        "from read_csv('/dev/stdin')",
        "from read_text('/proc/self/environ')",
        "from read_text('/proc/1/environ')",
        "from glob('/etc/*')",
        "from '/etc/passwd'",
        "call register_external_resource_type('a', 'b', 'c', 'd', 'e', 'f', 'g')",
        "install httpfs",
        "force install spatial from community",
        "install 'OUTSIDE/secret.csv'",
        "load httpfs",
        "load 'OUTSIDE/secret.csv'",
        "update extensions",
        "select * from 'https://localhost:1/x.parquet'",
        "from read_csv('http://localhost:1/x.csv')",
        "from 's3://bucket/x.parquet'",
        "from 'hf://datasets/x/y.parquet'",
        "attach 'http://localhost:1/x.duckdb' as other",
        "attach 'OUTSIDE/secret.csv' (type sqlite)",
        "attach 'host=localhost' as other (type postgres)",
        "from sqlite_scan('OUTSIDE/secret.duckdb', 'word')",
        "select * from st_read('OUTSIDE/secret.json')",
        "from duckdb_extensions()",
        "connect 'OUTSIDE/secret.duckdb'",
        "",
        "-- nothing",
    ),
]


@dataclass(frozen=True)
class Place:
    """A store with a run, a secret beside it, a working folder and a home, in one tree."""

    root: Path
    store: Store

    def fill(self, text: str) -> str:
        """The text with the tree's own paths."""
        committed = next(
            one for one in (self.store.root / "tables" / "manifest").iterdir() if not one.is_symlink()
        )
        words = {"OUTSIDE": self.root / "outside", "STORE": self.store.root, "COMMITTED": committed}
        for word, path in words.items():
            text = text.replace(word, str(path))
        return text

    def files(self) -> dict[str, Any]:
        """Everything in the tree: folders, links with their targets, files with their bytes."""
        return {str(path.relative_to(self.root)): _content(path) for path in sorted(self.root.rglob("*"))}

    def secret_in(self, rows: object) -> bool:
        """Whether rows tell the secret's word, or that its file is there."""
        return SECRET in repr(rows) or "outside/secret" in repr(rows) or "'word'" in repr(rows)


def _content(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() else None


def build(root: Path) -> Place:
    outside, working, home = (root / name for name in ("outside", "working", "home"))
    for folder in (outside, working, home):
        folder.mkdir()
    (outside / "secret.csv").write_text(f"word,n\n{SECRET},1\n")
    (outside / "secret.json").write_text(f'{{"word": "{SECRET}"}}\n')
    rows = pa.table({"word": [SECRET]}).replace_schema_metadata({"told": SECRET})
    pq.write_table(rows, outside / "secret.parquet")
    with duckdb.connect(str(outside / "secret.duckdb")) as database:
        database.execute(f"create table word as select '{SECRET}' as word")
    (outside / "exported").mkdir()
    (outside / "exported" / "schema.sql").write_text(f"create view imported as select '{SECRET}' as word;")
    (outside / "exported" / "load.sql").write_text("")
    store = open_store(root / "store", create=True)
    record = commit_manifest(store)
    run = RunRecord("run", "study", {}, {}, "complete")
    store.runs.write(run.with_keys({record.unit: record.key}))
    (store.root / "tables" / "manifest" / "linked.parquet").symlink_to(outside / "secret.parquet")
    (working / "linked.csv").symlink_to("../outside/secret.csv")
    return Place(root, store)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build(tmp_path_factory.mktemp("attacked"))


@pytest.fixture
def place(shared: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The tree that no attack may change, from its working folder; so all share one."""
    return at_home(shared, monkeypatch)


@pytest.fixture
def fresh_place(shared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the tree, for attacks that are let through."""
    shutil.copytree(shared.root, tmp_path / "copy", symlinks=True)
    own = tmp_path / "copy"
    for link in own.rglob("linked.*"):
        target = os.readlink(link).replace(str(shared.root), str(own))
        link.unlink()
        link.symlink_to(target)
    return at_home(Place(own, open_store(own / "store")), monkeypatch)


def at_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(place.root / "working")
    monkeypatch.setenv("HOME", str(place.root / "home"))
    return place


def commit_manifest(store: Store) -> CommitRecord:
    unit, ingredients = Unit("manifest"), {"stage": "manifest"}
    writing = store.begin(unit, key_of(ingredients), ingredients)
    columns = {
        "image_id": [0, 1],
        "path": ["a.png", "b.png"],
        "sha256": ["00", "01"],
        "width": [4, 4],
        "height": [3, 3],
        "label": [0, 1],
        "label_name": ["cat", "dog"],
    }
    writing.table("manifest", rows_to_table("manifest", columns))
    return writing.finish({"images": 2, "ok": 2, "quarantined": 0})


def settings(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Every setting of a connection."""
    return dict(connection.execute("select name, value::varchar from duckdb_settings()").fetchall())


CATALOGUE = """
select list(name order by name) from (
    select view_name || coalesce(sql, '') || coalesce(comment, '') as name from duckdb_views()
    union all select table_name from duckdb_tables()
    union all select function_name from duckdb_functions() where not internal
    union all select schema_name from duckdb_schemas()
    union all select type_name from duckdb_types() where not internal
    union all select sequence_name from duckdb_sequences()
    union all select name from duckdb_variables()
    union all select database_name from duckdb_databases()
    union all select name from duckdb_secrets()
)
"""


def shown(connection: duckdb.DuckDBPyConnection) -> Any:
    """Everything that a connection has to show: its views, tables, macros, types, variables and so on."""
    return connection.execute(CATALOGUE).fetchall()


def run_text(connection: duckdb.DuckDBPyConnection, text: str) -> Any:
    """Column names and rows of whatever a text gives."""
    found = connection.sql(text)
    return None if found is None else (found.columns, found.fetchall())


def name_of(attack: Attack) -> str:
    return attack.text[:60]


def test_there_are_enough_attacks_and_all_differ() -> None:
    texts = [attack.text for attack in ATTACKS]
    assert len(set(texts)) == len(texts) >= 45
    assert sum(attack.does is not None for attack in ATTACKS) >= 45


@pytest.mark.parametrize("attack", ATTACKS, ids=name_of)
def test_a_query_is_refused_and_nothing_changes(place: Place, attack: Attack) -> None:
    before = place.files()
    with pytest.raises(QueryError) as refused:
        sql.query(place.store, place.fill(attack.text))
    assert SECRET not in str(refused.value)
    assert place.files() == before


@pytest.mark.parametrize("attack", ATTACKS, ids=name_of)
def test_the_lock_alone_holds(place: Place, attack: Attack) -> None:
    before = place.files()
    connection = sql.connect(place.store)
    locked = settings(connection)
    try:
        found = run_text(connection, place.fill(attack.text))
    except (duckdb.Error, RuntimeError):
        found = None
    assert not place.secret_in(found)
    assert place.files() == before
    assert settings(connection) == locked
    connection.close()
    assert place.files() == before


@pytest.mark.parametrize("attack", [one for one in ATTACKS if one.does], ids=name_of)
def test_the_attack_is_a_live_one(fresh_place: Place, attack: Attack) -> None:
    place = fresh_place
    connection = sql.unlocked(place.store)
    connection.execute("set python_enable_replacements = true")
    files, set_to, shows = place.files(), settings(connection), shown(connection)
    found = None
    # One that overwrites what it reads ends with an error, when the harm is done.
    with suppress(duckdb.Error):
        found = run_text(connection, place.fill(attack.text))
    done = {
        READS: lambda: place.secret_in(found),
        WRITES: lambda: place.files() != files,
        SETS: lambda: settings(connection) != set_to,
        CHANGES: lambda: shown(connection) != shows,
    }
    assert done[attack.does]()


def test_no_table_function_reads_a_file(fresh_place: Place) -> None:
    """Also those that a later version of DuckDB adds: each is called with every kind of file."""
    before = fresh_place.files()
    assert functions_that_tell(sql.connect(fresh_place.store), fresh_place) == set()
    assert fresh_place.files() == before
    let_through = functions_that_tell(sql.unlocked(fresh_place.store), fresh_place)
    assert {
        "read_csv",
        "read_text",
        "read_blob",
        "read_json",
        "read_parquet",
        "glob",
        "read_duckdb",
    } <= let_through


def functions_that_tell(connection: duckdb.DuckDBPyConnection, place: Place) -> set[str]:
    """The table functions that give the secret away."""
    every = "select distinct function_name from duckdb_functions() where function_type = 'table'"
    found = set()
    for (name,) in duckdb.connect().execute(every).fetchall():
        for path in sorted((place.root / "outside").glob("secret.*")):
            with suppress(duckdb.Error, RuntimeError):
                if place.secret_in(run_text(connection, f"from {name}('{path}')")):
                    found.add(name)
    return found


def test_no_setting_can_be_changed(place: Place) -> None:
    """Also those that a later version of DuckDB adds. A schema to look in is not a setting of the lock's kind."""
    connection = sql.connect(place.store)
    before = settings(connection)
    changed = set()
    for name in before:
        for text in (f"set {name} = true", f"set {name} = '1'", f"set global {name} = 1", f"reset {name}"):
            with suppress(duckdb.Error):
                connection.execute(text)
        if settings(connection) != before:
            changed.add(name)
    assert changed <= {"schema", "search_path"}
    assert len(before) > 50


ENDLESS = [
    "select count(*) from range(1000000) a, range(1000000) b where hash(a.range, b.range) = 7",
    "select count(*) from manifest, range(1000000) a, range(1000000) b where hash(image_id, a.range, b.range) = 7",
    "with recursive r as (select 1 as n union all select n + 1 from r) select max(n) from r",
    "select sum(sin(range)) from range(1000000000000)",
    "explain analyze select count(*) from range(1000000) a, range(1000000) b where hash(a.range, b.range) = 7",
    "select sleep_ms(3600000)",
]


# Enough to open the store in on a machine that does much else, too: that takes of the same time.
SECONDS = 3


@pytest.mark.parametrize("text", ENDLESS, ids=lambda text: text[:40])
def test_an_endless_query_is_stopped(place: Place, text: str) -> None:
    before = place.files()
    with pytest.raises(QueryError, match=rf"ran past {SECONDS} s and was stopped; narrow it or raise --timeout"):
        sql.query(place.store, text, timeout=SECONDS)
    assert place.files() == before


BOMBS = [
    "select * from range(30000000) order by hash(range)",
    "select list(range) from range(100000000)",
    "select string_agg(range::varchar) from range(100000000)",
    "select a.range, count(*) from range(100000000) a group by all",
    "select hash(a.range), b.range from range(30000000) a join range(30000000) b using (range)",
]


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: text[:40])
def test_a_query_over_its_memory_is_refused_without_a_file(place: Place, text: str) -> None:
    before = place.files()
    with pytest.raises(QueryError, match=r"needs more memory than 60MB .* raise --memory"):
        sql.query(place.store, text, memory_limit="60MB")
    assert place.files() == before


def test_without_the_lock_the_same_query_moves_its_memory_to_files(fresh_place: Place) -> None:
    before = fresh_place.files()
    connection = sql.unlocked(fresh_place.store)
    connection.execute("set memory_limit = '60MB'; set threads = 1")
    connection.execute("create table t as select range, repeat('x', 100) from range(500000) order by hash(range)")
    assert fresh_place.files() != before


def test_a_result_over_the_limit_is_refused(place: Place) -> None:
    with pytest.raises(QueryError, match="the result is larger than 60MB"):
        sql.query(place.store, "from range(1000000000)", memory_limit="60MB")


# One call of a function, which DuckDB neither interrupts nor counts: the process of its own ends it.
UNCOUNTED = [
    "select len(repeat('x', 4000000000)) as n",
    "select list_sort(range(300000000))[1] as n",
    "select list_aggregate(range(300000000), 'sum') as n",
]


@pytest.mark.parametrize("text", UNCOUNTED)
def test_memory_that_duckdb_does_not_count_ends_with_the_process(place: Place, text: str) -> None:
    with pytest.raises(QueryError, match=r"raise --memory"):
        query_apart(place.store, text, memory_limit="60MB")


def test_what_cannot_be_interrupted_is_killed(place: Place) -> None:
    stuck = "select levenshtein(repeat('a', 1000000), repeat('b', 1000000))"
    with pytest.raises(QueryError, match=rf"ran past {SECONDS} s, could not be interrupted and was killed"):
        query_apart(place.store, stuck, timeout=SECONDS, grace=2.0)


COMMANDS = [
    ("copy (select 1) to 'new.csv'", "got COPY: a query cannot change the store"),
    ("explain analyze copy manifest to 'COMMITTED' (use_tmp_file false)", "file system operations are disabled"),
    ("from read_text('OUTSIDE/secret.csv')", "file system operations are disabled"),
    (ENDLESS[0], f"ran past {SECONDS} s and was stopped"),
    (BOMBS[0], "needs more memory than 60MB"),
]


@pytest.mark.parametrize(("text", "message"), COMMANDS, ids=[text[:30] for text, _ in COMMANDS])
def test_the_command_refuses_them_too(place: Place, text: str, message: str) -> None:
    """The working folder holds modules of its own, which must not be taken for the library's."""
    for name in ("duckdb", "pyarrow", "json", "storage"):
        (place.root / "working" / f"{name}.py").write_text(
            "raise SystemExit('a module of the working folder ran')"
        )
    before = place.files()
    arguments = ("--store", str(place.store.root), "--timeout", str(SECONDS), "--memory", "60MB")
    done = subprocess.run(
        [VITRINE, "sql", place.fill(text), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert place.files() == before
