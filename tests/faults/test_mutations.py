"""Each guard of the store taken away in turn: with any of them gone, some test fails.

A copy of the packages is changed as its table says, and the tests that guard the guard run on the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.faults.processes import FULL

PACKAGES = ("storage", "tasks", "xai_core", "flows", "tests")


@dataclass(frozen=True)
class Mutation:
    """A guard taken away: in ``file`` the text ``old`` becomes ``new``; ``tests`` must notice."""

    guard: str
    file: str
    old: str
    new: str
    tests: str
    short: bool = False


MUTATIONS = (
    Mutation(
        "checksum of every Zarr chunk",
        "storage/arrays.py",
        "Zstd(level=ZSTD_LEVEL, checksum=True)",
        "Zstd(level=ZSTD_LEVEL, checksum=False)",
        "tests/storage/test_arrays.py",
        short=True,
    ),
    Mutation(
        "checksum of the index of a shard",
        "storage/arrays.py",
        "google_crc32c.value(content)",
        "(google_crc32c.value(content) ^ 1)",
        "tests/storage/test_arrays.py",
    ),
    Mutation(
        "alignment of writes to shards",
        "storage/arrays.py",
        "if start % spec.shard_rows or stop != min(start + spec.shard_rows, spec.rows):",
        "if False:",
        "tests/storage/test_arrays.py",
        short=True,
    ),
    Mutation(
        "record last",
        "storage/store.py",
        "        self.store.commits.write(record)\n        return record",
        "        return record",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "record after the objects",
        "storage/store.py",
        "        return Commit(self, unit, key, ingredients)",
        "        self.commits.write(CommitRecord(key, unit, ingredients))\n"
        "        return Commit(self, unit, key, ingredients)",
        "tests/storage/test_store.py",
        short=True,
    ),
    Mutation(
        "lock of a key",
        "storage/lock.py",
        "        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)",
        "        pass",
        "tests/storage/test_lock.py",
        short=True,
    ),
    Mutation(
        "a lock's file is the one that its name stands for",
        "storage/lock.py",
        "os.fstat(descriptor).st_ino == path.stat().st_ino",
        "True",
        "tests/storage/test_lock.py",
    ),
    Mutation(
        "maintenance waits for writers of units",
        "storage/lock.py",
        "if not free or living:",
        "if not free:",
        "tests/storage/test_lock.py",
    ),
    Mutation(
        "digest of a record",
        "storage/sealed.py",
        'digest_bytes(body).encode() == head["digest"] else None',
        "True else None",
        "tests/storage/test_verify.py",
    ),
    Mutation(
        "size of objects at a glance",
        "storage/store.py",
        "if size != one.bytes:",
        "if False:",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "full hash in verify",
        "storage/verify.py",
        "size == one.bytes and digest_file(root / one.path) == one.sha256",
        "size == one.bytes",
        "tests/storage/test_verify.py",
    ),
    Mutation(
        "digest of what is read",
        "storage/store.py",
        "if expected is not None and digest_bytes(content) != expected:",
        "if False:",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "checksum of Parquet pages",
        "storage/store.py",
        "page_checksum_verification=True",
        "page_checksum_verification=False",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "rename of a finished file",
        "storage/files.py",
        "        write(temporary)\n        sync(temporary)\n        os.replace(temporary, path)",
        "        write(path)",
        "tests/storage/test_files.py",
        short=True,
    ),
    Mutation(
        "fsync of a file before its rename",
        "storage/files.py",
        "        sync(temporary)\n",
        "",
        "tests/storage/test_files.py",
    ),
    Mutation(
        "fsync of a folder after the rename",
        "storage/files.py",
        "    sync(path.parent)\n\n\ndef publish_bytes",
        "\n\ndef publish_bytes",
        "tests/storage/test_files.py",
    ),
    Mutation(
        "durable folders",
        "storage/files.py",
        "    path.mkdir(exist_ok=True)\n    sync(path.parent)",
        "    path.mkdir(exist_ok=True)",
        "tests/storage/test_files.py",
    ),
    Mutation(
        "leftovers of living writers are spared",
        "storage/files.py",
        'return not _is_alive(int(named["pid"]))',
        "return True",
        "tests/storage/test_files.py",
    ),
    Mutation(
        "a damaged unit's record goes before it is written again",
        "storage/store.py",
        "        self.commits.drop(unit, key)\n        return Commit",
        "        return Commit",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "a commit that loses its rows is dropped first",
        "storage/store.py",
        "        self._supersede(shard)\n",
        "",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "datasets from records",
        "storage/store.py",
        '        written = [record for record in records if name in record.facts.get("tables", {})]',
        '        return sorted(f"tables/{name}/{file}" for file in os.listdir(self.root / "tables" / name))',
        "tests/storage/test_store.py",
    ),
    Mutation(
        "a newer store is refused",
        "storage/store.py",
        "if number > FORMAT_VERSION:",
        "if False:",
        "tests/storage/test_store.py",
    ),
    Mutation(
        "garbage is what no run refers to",
        "storage/gc.py",
        "if record and record.key in live for one",
        "if record for one",
        "tests/storage/test_gc.py",
    ),
    Mutation(
        "garbage collection keeps what runs refer to",
        "storage/gc.py",
        "live = {key for run in store.runs.all() for key in run.units().values()}",
        "live = {key for run in store.runs.all()[-1:] for key in run.units().values()}",
        "tests/storage/test_gc.py",
    ),
    Mutation(
        "records go before objects",
        "storage/gc.py",
        "return (*self.records, *self.objects, *self.listings, *self.leftovers)",
        "return (*self.objects, *self.listings, *self.leftovers, *self.records)",
        "tests/storage/test_gc.py",
    ),
    Mutation(
        "external access off",
        "storage/sql.py",
        "set enable_external_access = false",
        "set enable_external_access = true",
        "tests/storage/test_sql.py tests/faults/test_sql_attacks.py",
    ),
    Mutation(
        "configuration locked",
        "storage/sql.py",
        "set lock_configuration = true",
        "set lock_configuration = false",
        "tests/storage/test_sql.py tests/faults/test_sql_attacks.py",
    ),
    Mutation(
        "images in = ok + quarantined",
        "tasks/execute.py",
        "if outcome.images != outcome.ok + len(outcome.bad):",
        "if False:",
        "tests/tasks/test_chain.py -k loses_an_image",
    ),
)
CHOSEN = MUTATIONS if FULL else tuple(one for one in MUTATIONS if one.short)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages as they are."""
    root = tmp_path_factory.mktemp("copy")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    return root


def run_tests(root: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """Runs tests on a copy, which stands before the installed packages on the path; the first failure ends it."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.guard)
def test_the_guard_stands_where_the_table_says(mutation: Mutation) -> None:
    assert (REPOSITORY / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.parametrize("tests", sorted({one.tests for one in CHOSEN}))
def test_the_copy_passes_while_its_guards_stand(whole: Path, tests: str) -> None:
    ran = run_tests(whole, tests)
    assert ran.returncode == 0, ran.stdout[-2000:]


@pytest.mark.parametrize("mutation", CHOSEN, ids=lambda one: one.guard)
def test_without_the_guard_some_test_fails(whole: Path, mutation: Mutation) -> None:
    path = whole / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        ran = run_tests(whole, mutation.tests)
    finally:
        path.write_text(text)
    # 1: tests were run and some failed; a copy that cannot be imported ends with another code.
    assert ran.returncode == 1, ran.stdout[-2000:]
    assert "\nFAILED tests/" in ran.stdout
    assert "\nERROR " not in ran.stdout
