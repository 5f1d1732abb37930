"""A writer killed at a named moment of a commit: nothing half-done is seen, and only its unit is redone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.canonical import digest_file
from storage.commits import KEY_CHARACTERS, Unit
from storage.schema import TABLES
from storage.store import Store, open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import Faults, Warm, committed, digest, temporary, units

STUDY = config_with(
    TINY,
    dataset={"images": 6},
    methods=["grad_cam"],
    metrics=["p_deletion"],
    run={"shard_size": 3},
)


@dataclass(frozen=True)
class Object:
    """Something that a unit publishes: whose it is, and which path it has."""

    unit: Unit
    path: str


OBJECTS = {
    "shard": Object(Unit("attribute", "grad_cam", 1), r"/arrays/attribute/.*/maps/.*c\.1\."),
    "table": Object(Unit("metrics", "grad_cam", 1), r"/tables/metrics/.*metrics-0000001-"),
    "file": Object(Unit("dictionary", "blocks.2 / bisecting_kmeans"), r"/files/dictionary/"),
    "record": Object(Unit("parts", "", 1), r"/commits/parts/_/.*0000001-"),
}

# Whether a temporary file is left behind, and what is true at that moment.
MOMENTS = {
    "write": (False, "nothing of it written; of a record: everything else in place"),
    "sync": (True, "written, not synced"),
    "rename": (True, "synced, not in place"),
    "settle": (False, "in place, its folder not synced; of a record: the unit is done"),
}
# What a query calls them; targets are columns of images.
QUERIED = {name: name for name in TABLES if name not in ("manifest", "targets")} | {"manifest": "images"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_a_killed_writer_leaves_no_half_and_only_its_unit_is_redone(
    warm: Warm, tmp_path: Path, kind: str, moment: str
) -> None:
    clean = warm.clean(STUDY)
    thing, leaves_a_file = OBJECTS[kind], MOMENTS[moment][0]
    is_done = (kind, moment) == ("record", "settle")
    root = tmp_path / "store"
    faults = Faults(tmp_path, ({"moment": moment, "path": thing.path},))

    assert warm.run(STUDY, root, faults) == -9, warm.said()
    (fired,) = faults.fired()
    assert fired.split()[1] == moment
    store = open_store(root)
    done, key = committed(store), units(store)[thing.unit]
    begun = faults.begun()
    assert begun[key[:KEY_CHARACTERS]] == 1
    assert len(temporary(root)) == leaves_a_file
    assert (thing.unit in done) == is_done
    assert (store.commits.read(thing.unit, key) is not None) == is_done
    if kind == "record":
        assert missing(root, clean.store, thing.unit) == [], "the record comes before what it names"
    # Whatever was begun before is done, and is all that a reader sees.
    assert begun == dict.fromkeys((one[:KEY_CHARACTERS] for one in [*done.values(), key]), 1)
    assert visible(store) == rows_of(clean.store, done)

    assert warm.run(STUDY, root, faults) == 0, warm.said()
    assert len(faults.fired()) == 1
    assert temporary(root) == []
    again = {name for name, times in faults.begun().items() if times > 1}
    assert again == (set() if is_done else {key[:KEY_CHARACTERS]})
    assert faults.begun().total() == len(units(store)) + len(again)
    assert digest(root) == clean.digest
    assert visible(store) == rows_of(clean.store, units(store))


def missing(root: Path, clean: Store, unit: Unit) -> list[str]:
    """Objects of a unit that are not there as in a clean store; those that tell times only have to be there."""
    (record,) = (record for _, record in clean.records() if record.unit == unit)
    return [
        one.path
        for one in record.objects
        if not (root / one.path).exists() or (one.repeatable and digest_file(root / one.path) != one.sha256)
    ]


def visible(store: Store) -> dict[str, int]:
    """How many rows of each table a query counts."""
    counts = (f"select '{name}' as name, count(*) as n from {view}" for name, view in QUERIED.items())
    return {row["name"]: row["n"] for row in store.sql(" union all ".join(counts)).to_pylist()}


def rows_of(store: Store, chosen: dict[Unit, str]) -> dict[str, int]:
    """How many rows of each table some units of a store have."""
    records = [record for _, record in store.records() if record.unit in chosen]
    return {name: sum(store.read_table(record, name).num_rows for record in records) for name in QUERIED}


def test_the_children_are_forked_from_a_process_of_one_thread(warm: Warm) -> None:
    # Arrow's allocator keeps one of its own, and knows about forks.
    assert [name for name in warm.threads if name != "jemalloc_bg_thd"] == ["python"]
