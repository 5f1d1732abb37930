"""Two runs in one store at once: the same one is refused, others share what they share and disturb nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from storage.commits import Unit, key_of
from storage.digest import results_digest
from storage.errors import StoreLockedError
from storage.lock import holder_of
from storage.store import Store, open_store
from storage.verify import verify_store
from tests.conftest import REPOSITORY, TINY, Ran, config_with
from tests.faults.processes import Faults, start_vitrine
from tests.flows.command import call, vitrine, wait_for, write_config
from tests.storage.writing import metric_rows, run_of

EXECUTED = r"^rename .*/tables/timings/"
FIRST = config_with(TINY, name="first", methods=["grad_cam", {"name": "integrated_gradients", "steps": 4}])
SECOND = config_with(TINY, name="second", methods=["grad_cam", "kl_hessian"])


class Executions(Faults):
    """Logs every execution of a unit that came to its end, by the name of its timings file."""

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "VITRINE_TEST_LOGGED": EXECUTED}


@pytest.fixture(scope="module")
def clean(run_chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Both studies, each alone in a store of its own."""
    return {
        config["name"]: run_chain(config, tmp_path_factory.mktemp(config["name"]) / "store")
        for config in (FIRST, SECOND)
    }


def test_two_configs_at_once_share_their_units_and_the_same_config_is_refused(
    tmp_path: Path, prefect_api: str, clean: dict[str, Ran]
) -> None:
    store, faults = tmp_path / "store", Executions(tmp_path)
    open_store(store, create=True)
    logs = {config["name"]: tmp_path / f"{config['name']}.log" for config in (FIRST, SECOND)}
    processes = {
        config["name"]: start_vitrine(
            "run",
            write_config(tmp_path / f"{config['name']}.yaml", config),
            "--store",
            store,
            cwd=tmp_path,
            log=logs[config["name"]],
            environment=faults.environment(prefect_api),
        )
        for config in (FIRST, SECOND)
    }
    try:
        ids = {name: clean[name].run_id for name in processes}
        locks = {name: store / "locks" / f"run-{run_id}.lock" for name, run_id in ids.items()}
        both = lambda: all(holder_of(lock) for lock in locks.values())  # noqa: E731
        wait_for(both, "both runs to hold their locks at once", processes["first"], logs["first"])
        refused = vitrine("run", tmp_path / "first.yaml", "--store", store, cwd=tmp_path)
        assert refused.returncode == 2
        pid = processes["first"].pid
        assert f"run {ids['first']} is being written by process {pid} on " in refused.stderr
        assert " since 20" in refused.stderr
        for name, process in processes.items():
            assert process.wait(300) == 0, logs[name].read_text()[-3000:]
    finally:
        for process in processes.values():
            process.kill()
    opened = open_store(store)
    for name, run_id in ids.items():
        assert results_digest(opened, run_id) == results_digest(clean[name].store, run_id)
    assert verify_store(opened).damage == ()
    # Nobody did what another had done or was doing.
    assert set(Counter(faults.begun()).values()) == {1}
    units = {key for run in opened.runs.all() for key in run.units().values()}
    assert len(faults.begun()) == len(units)
    first, second = (run.units() for run in opened.runs.all())
    shared = {unit.stage for unit, key in first.items() if second.get(unit) == key}
    assert shared == {"manifest", "predict", "parts", "pfv", "dictionary", "exemplars", "attribute", "metrics"}


HOLD = """
import sys
from storage.commits import Unit
from storage.store import open_store
store = open_store(sys.argv[1])
with store.running("r"), store.writing(Unit("metrics", "m", int(sys.argv[2])), sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(store: Store, shard: int, key: str) -> subprocess.Popen[bytes]:
    """A process that holds the run "r" and a unit of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), str(shard), key],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_is_no_hindrance(store: Store, end: signal.Signals) -> None:
    unit, key = Unit("metrics", "m", 0), "a" * 64
    holder = hold(store, 0, key)
    with pytest.raises(StoreLockedError, match=rf"run r is being written by process {holder.pid} on .+ since 20"):
        enter(store.running("r"))
    with pytest.raises(StoreLockedError, match=rf"unit metrics m #0 is being written by process {holder.pid} on"):
        enter(store.writing(unit, key))
    with pytest.raises(StoreLockedError, match=rf"process {holder.pid} on"):
        enter(store.maintenance())
    holder.send_signal(end)
    holder.communicate()
    with store.running("r"), store.writing(unit, key):
        pass
    with store.maintenance():
        pass


def test_disjoint_keys_are_written_at_the_same_time(store: Store) -> None:
    """While another process holds a unit of another run, units under other keys are written and committed."""
    holder = hold(store, 0, "a" * 64)
    unit, ingredients = Unit("metrics", "grad_cam", 0), {"other": "unit"}
    with store.running("another"), store.writing(unit, key_of(ingredients)):
        writing = store.begin(unit, key_of(ingredients), ingredients)
        writing.table("metrics", metric_rows(range(4)))
        record = writing.finish({"images": 4, "ok": 4, "quarantined": 0})
    assert holder.poll() is None
    assert store.done(unit, record.key) == record
    holder.kill()
    holder.communicate()


WRITE = """
import sys
from storage.store import open_store
from tests.storage.writing import commit
for method in sys.argv[2:]:
    commit(open_store(sys.argv[1]), 0, method=method)
    commit(open_store(sys.argv[1]), 1, method=method)
"""


def test_many_writers_of_disjoint_keys_lose_nothing(store: Store) -> None:
    methods = [[f"method-{writer}-{number}" for number in range(8)] for writer in range(3)]
    command = [sys.executable, "-c", WRITE, str(store.root)]
    writers = [subprocess.Popen([*command, *names], cwd=REPOSITORY) for names in methods]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    records = list(store.commits)
    assert len(records) == 48
    run_of(store, "all", records)
    assert verify_store(store).damage == ()
    rows = store.sql("select method, count(*) as n, sum(image_id) as s from metrics group by method").to_pylist()
    assert len(rows) == 24
    assert {(row["n"], row["s"]) for row in rows} == {(8, 28)}
    for record in records:
        assert (store.read_array(record, "maps") == record.unit.shard + 1).all()


def test_deleting_one_of_two_real_runs_leaves_the_other_whole(
    run_chain, clean: dict[str, Ran], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(clean["first"].store.root, tmp_path / "store"))
    second = run_chain(SECOND, root)
    # Shared: all but the second method's own units, and the report.
    assert second.counts == {"attribute": 3, "metrics": 3, "report": 1}
    rows = second.store.sql("select run_id, count(distinct method) as n from metrics group by run_id").to_pylist()
    assert {row["run_id"]: row["n"] for row in rows} == {clean["first"].run_id: 2, clean["second"].run_id: 2}
    deleted = call("delete", clean["first"].run_id, "--store", root, cwd=tmp_path)
    assert deleted.returncode == 0, deleted.stderr
    assert "belong to no run now" in deleted.stdout
    dry = call("gc", "--store", root, cwd=tmp_path)
    assert "nothing was removed" in dry.stdout
    assert verify_store(second.store).uncommitted == ()
    assert call("gc", "--store", root, "--delete", cwd=tmp_path).returncode == 0
    left = open_store(root)
    assert results_digest(left, second.run_id) == results_digest(clean["second"].store, second.run_id)
    found = verify_store(left)
    assert (found.damage, found.uncommitted) == ((), ())
    assert not list(root.rglob("*integrated_gradients*"))
    assert run_chain(SECOND, root).executed == ()


def enter(context) -> None:
    with context:
        pass
