"""Real Dask clusters: local ones, ones at an address, and ones that cannot do what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from dask.utils import parse_timedelta
from distributed import Client, LocalCluster

from flows.cluster import _closed, _refuse_missing_resources, executor, local_workers
from flows.dispatch import DaskExecutor, Placement, WorkersLostError
from flows.study import run_study
from storage.errors import StoreError
from storage.store import open_store
from tasks.config import ComputeConfig, StudyConfig
from tasks.execute import Failure
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.study import Study
from tests.conftest import TINY, config_with
from xai_core.errors import UsageError


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A scheduler with one CPU worker in a process of its own."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs="ERROR"
    ) as started:
        yield started


def test_workers_without_gpus_are_refused_where_one_is_asked_for(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        _refuse_missing_resources(client, "cpu")
        with pytest.raises(UsageError, match=r"run\.device: expected workers with a GPU, .+--resources GPU=1"):
            _refuse_missing_resources(client, "cuda")
    asked = ComputeConfig(scheduler=cluster.scheduler_address)
    with pytest.raises(UsageError, match=r"run\.device: expected workers with a GPU"), executor(asked, "cuda"):
        pytest.fail("a cluster without GPUs was taken")


def test_a_scheduler_without_workers_is_refused() -> None:
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None, silence_logs="ERROR") as empty,
        pytest.raises(UsageError, match=r"compute\.scheduler: expected at least one worker"),
        executor(ComputeConfig(scheduler=empty.scheduler_address), "cpu"),
    ):
        pytest.fail("a cluster without workers was taken")


def test_a_scheduler_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.cluster.CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with (
            pytest.raises(UsageError, match=rf"compute\.scheduler: no Dask scheduler at {address}"),
            executor(ComputeConfig(scheduler=address), "cpu"),
        ):
            pytest.fail("connected to nothing")


def test_a_study_runs_on_the_scheduler_at_an_address(
    cluster: LocalCluster, prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers stand in another folder: a relative store must still be the driver's.
    monkeypatch.chdir(tmp_path)
    study = config_with(
        TINY,
        dataset={"images": 4},
        methods=["grad_cam"],
        concepts={"layers": []},
        compute={"scheduler": cluster.scheduler_address},
    )
    result = run_study(StudyConfig.model_validate(study), Path("store"))
    assert result.executed == 6
    assert (tmp_path / "store").is_dir()
    assert result.report.resolve().is_file()
    again = run_study(StudyConfig.model_validate(study), Path("store"))
    assert again.executed == 0


def test_a_unit_that_fails_is_a_failure_and_the_others_are_committed(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "store", create=True)
    study = Study(StudyConfig.model_validate(TINY), store)
    works = to_run(Planner(study).stage(STAGES["manifest"]))
    # A folder where the second unit's record should go: it cannot be committed.
    store.commits.path(works[1].unit, works[1].key).mkdir(parents=True)
    with executor(ComputeConfig(scheduler=cluster.scheduler_address), "cpu") as dask:
        results = {one.unit.shard: one for one in dask.run(works)}
    assert isinstance(results[1], Failure)
    assert "IsADirectoryError" in results[1].error
    assert [store.done(work.unit, work.key) is not None for work in works] == [True, False, True]


def test_a_run_that_no_worker_comes_back_to_ends(tmp_path: Path) -> None:
    study = Study(StudyConfig.model_validate(TINY), open_store(tmp_path / "store", create=True))
    works = to_run(Planner(study).stage(STAGES["manifest"]))
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None, silence_logs="ERROR") as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(WorkersLostError, match=r"compute\.workers: expected Dask workers .* got none for 0\.1 s"),
    ):
        list(DaskExecutor(client, Placement("cpu", 1), lambda: None, patience=0.1).run(works))


def test_a_local_worker_that_is_slow_to_come_back_is_not_given_up() -> None:
    with executor(ComputeConfig(workers=1), "cpu"):
        wait = dask.config.get("distributed.deploy.lost-worker-timeout")
        # Dask starts workers again itself; after this time it would take one off that is not back yet.
        assert parse_timedelta(wait) > 3600 * 24


def test_local_workers_are_counted_from_the_machine() -> None:
    assert local_workers(ComputeConfig(workers=3), "cpu") == 3
    assert 1 <= local_workers(ComputeConfig(), "cpu") <= 4


def test_a_store_that_another_process_made_unreadable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "vitrine.json").write_text('{"format": 99}')
    with pytest.raises(StoreError, match="upgrade vitrine"):
        run_study(StudyConfig(), tmp_path / "store")


class Lingering:
    """Something that takes longer to close than its owner waits, or does not close at all."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def close(self) -> None:
        raise self._error


def test_to_close_late_is_no_failed_run() -> None:
    done = []
    with _closed(Lingering(TimeoutError())):
        done.append("all")
    assert done == ["all"]
    with pytest.raises(OSError, match="another trouble"), _closed(Lingering(OSError("another trouble"))):
        pass


def test_what_is_ours_is_closed_also_after_an_error(cluster: LocalCluster) -> None:
    client = Client(cluster, set_as_default=False)
    with pytest.raises(UsageError, match="wrong"), _closed(client):
        raise UsageError("wrong")
    assert client.status == "closed"
