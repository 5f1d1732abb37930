"""Dask workers that die in mid-unit: the run completes, little is done twice, and nothing stands twice in a table."""

from __future__ import annotations

from pathlib import Path

from storage.commits import KEY_CHARACTERS, Unit
from storage.schema import TABLES
from storage.store import Store, open_store
from tests.conftest import TINY, config_with
from tests.faults.processes import Faults, Warm, committed, digest, start_vitrine, units
from tests.flows.command import LIMIT_SECONDS, write_config

WORKERS = 2
STUDY = config_with(
    TINY,
    methods=["grad_cam", {"name": "integrated_gradients", "steps": 2}],
    concepts={"layers": []},
    run={"shard_size": 2},
    compute={"workers": WORKERS},
)
# Dask's own: a unit is given up after it took so many workers with it.
TRIES = 4


def run(folder: Path, api: str, faults: Faults) -> tuple[int, str]:
    """Runs the study; its exit code and all that it and its workers said."""
    write_config(folder / "study.yaml", STUDY)
    log = folder / "run.log"
    log.write_bytes(b"")
    process = start_vitrine(
        "run", "study.yaml", "--store", "store", cwd=folder, log=log, environment=faults.environment(api)
    )
    return process.wait(LIMIT_SECONDS), log.read_text()


def test_a_run_outlives_workers_that_are_killed_and_that_crash(
    warm: Warm, tmp_path: Path, prefect_api: str
) -> None:
    deaths = (
        {"moment": "write", "path": r"/arrays/attribute/grad_cam.*/maps/.*c\.1\."},
        {"moment": "rename", "path": r"/tables/metrics/metrics-0000003-", "how": "SIGSEGV"},
    )
    faults = Faults(tmp_path, deaths)
    status, said = run(tmp_path, prefect_api, faults)
    assert status == 0, said[-3000:]
    victims = {faults.fired(number)[0].split()[0] for number in range(len(deaths))}
    assert len(victims) == 2

    root = tmp_path / "store"
    assert digest(root) == warm.clean(STUDY).digest
    begun, all_units = faults.begun(), units(open_store(root))
    assert all(begun[all_units[unit][:KEY_CHARACTERS]] >= 2 for unit in ILL)
    # The dead worker's own unit, and receipts that the dead one still held: those units are found done.
    assert len(all_units) + len(deaths) <= begun.total() <= len(all_units) + 2 * len(deaths) * WORKERS
    assert doubled(open_store(root)) == {}


ILL = (Unit("attribute", "grad_cam", 1),)


def doubled(store: Store) -> dict[str, int]:
    """Rows that stand more than once in a table that a query sees, by table."""
    views = {name: name for name in TABLES if name not in ("manifest", "targets")} | {"manifest": "images"}
    counts = {
        name: store.sql(f"select count(*) - count(distinct t) as n from {view} t")["n"][0].as_py()
        for name, view in views.items()
    }
    return {name: count for name, count in counts.items() if count}


def test_a_unit_that_kills_every_worker_is_named_and_given_up_and_no_other_is(
    warm: Warm, tmp_path: Path, prefect_api: str
) -> None:
    deadly = Unit("attribute", "grad_cam", 1)
    death = {"moment": "write", "path": r"/arrays/attribute/grad_cam.*/maps/.*c\.1\.", "times": 99}
    faults = Faults(tmp_path, (death,))
    status, said = run(tmp_path, prefect_api, faults)
    assert status == 1
    assert len(faults.fired()) == TRIES
    (failed,) = (line for line in said.splitlines() if line.startswith("failed: "))
    assert f"1 of 12 units failed; the first, {deadly}: expected a worker to live through it" in failed
    assert f"got {TRIES} that died of it" in failed
    assert "lower run.batch_size" in failed
    assert "resume with: vitrine run study.yaml --store store" in said
    assert "Traceback" not in said

    store = open_store(tmp_path / "store")
    left = units(store).keys() - committed(store).keys()
    assert left == {deadly}
    assert faults.begun()[units(store)[deadly][:KEY_CHARACTERS]] == TRIES

    status, said = run(tmp_path, prefect_api, Faults(tmp_path))
    assert status == 0, said[-3000:]
    assert digest(tmp_path / "store") == warm.clean(STUDY).digest
