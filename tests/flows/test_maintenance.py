"""The commands that keep a store in order, as a person gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from storage.store import Store, open_store
from tests.flows.command import call
from tests.storage.writing import commit, run_of, tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs that share a unit."""
    opened = open_store(tmp_path / "store", create=True)
    shared, own = commit(opened, 0), commit(opened, 1)
    run_of(opened, "one", [shared])
    run_of(opened, "two", [shared, own])
    return opened


def test_a_whole_store(store: Store, tmp_path: Path) -> None:
    told = call("verify", "--store", store.root, cwd=tmp_path)
    assert (told.returncode, told.stdout) == (0, "7 objects are whole (4.6 kB)\n")


def test_damage_is_told_repaired_and_told_again(store: Store, tmp_path: Path) -> None:
    record = next(iter(store.commits))
    (store.root / record.objects[0].path).unlink()
    (store.root / "stray.txt").write_text("mine")
    told = call("verify", "--store", store.root, cwd=tmp_path)
    assert told.returncode == 1
    assert told.stdout.splitlines() == [
        "foreign: stray.txt",
        f"missing: {record.objects[0].path} ({record.unit})",
        "1 foreign, 1 missing",
        "--repair drops the commits of what is damaged; running the study again then redoes just these",
        "foreign files are not vitrine's: look at them and move or remove them by hand",
    ]
    repaired = call("verify", "--repair", "--store", store.root, cwd=tmp_path)
    assert repaired.returncode == 1
    assert "were dropped: run the study again" in repaired.stdout
    (store.root / "stray.txt").unlink()
    again = call("verify", "--store", store.root, cwd=tmp_path)
    assert again.returncode == 0
    assert "objects without a commit" in again.stdout
    lines = call("status", "--store", store.root, cwd=tmp_path).stdout.splitlines()
    states = {line.split()[1] for line in lines if line.split()[:1] in (["one"], ["two"])}
    assert states == {"incomplete"}


def test_a_run_is_forgotten_and_its_own_objects_go_when_told(store: Store, tmp_path: Path) -> None:
    told = call("delete", "two", "--store", store.root, cwd=tmp_path)
    assert told.returncode == 0
    assert "run two is forgotten" in told.stdout
    assert "4 files" in told.stdout
    before = tree(store)
    dry = call("gc", "--store", store.root, cwd=tmp_path)
    assert dry.stdout.splitlines()[-2].startswith("would remove 1 commits, 3 objects")
    assert "nothing was removed" in dry.stdout
    assert tree(store) == before
    done = call("gc", "--delete", "--store", store.root, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("removed 1 commits, 3 objects")
    assert len(before) - len(tree(store)) == 4
    assert (
        call("gc", "--store", store.root, cwd=tmp_path).stdout
        == "nothing to remove: every file belongs to a run\n"
    )
    assert call("verify", "--store", store.root, cwd=tmp_path).returncode == 0


def test_a_misspelt_run_is_not_deleted(store: Store, tmp_path: Path) -> None:
    told = call("delete", "tow", "--store", store.root, cwd=tmp_path)
    assert told.returncode == 2
    assert "expected a run of" in told.stderr
    assert "did you mean 'two'" in told.stderr
    assert len(store.runs.all()) == 2


@pytest.mark.parametrize("command", [("verify", "--repair"), ("gc",), ("gc", "--delete"), ("delete", "two")])
def test_what_runs_is_not_disturbed(store: Store, tmp_path: Path, command: tuple[str, ...]) -> None:
    before = tree(store)
    with store.running("two"):
        told = call(*command, "--store", store.root, cwd=tmp_path)
    assert told.returncode == 2
    assert "is being written by process" in told.stderr
    assert tree(store) == before


@pytest.mark.parametrize("command", [("verify",), ("gc",), ("delete", "x"), ("status",), ("quarantine",)])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    told = call(*command, "--store", tmp_path / "nothing", cwd=tmp_path)
    assert told.returncode == 2
    assert "expected a store in" in told.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_was_killed_is_not_said_to_run(store: Store, tmp_path: Path) -> None:
    run = store.runs.read("one")
    assert run is not None
    store.runs.write(replace(run, state="running"))

    def state() -> str:
        lines = call("status", "--store", store.root, cwd=tmp_path).stdout.splitlines()
        return next(line.split()[1] for line in lines if line.split()[:1] == ["one"])

    assert state() == "killed"
    with store.running("one"):
        assert state() == "running"
