"""Dask: a local cluster by default, or the one at an address. Shards go out, small receipts come back."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch

from flows.dispatch import DaskExecutor, Placement, SchedulerLostError
from tasks.config import ComputeConfig
from xai_core.allocation import GLIBC
from xai_core.errors import UsageError

C = TypeVar("C", bound=Any)

MOST_LOCAL_WORKERS = 4
CONNECT_SECONDS = 15
# How long a run waits without any worker. Local ones are started again when they die, within seconds; at the
# scheduler that a config names others may join at any time.
PATIENCE_SECONDS = 300.0

# What fails in a worker comes back with its unit and is told once, in one line.
SILENCE = {"DASK_LOGGING__DISTRIBUTED": "critical"}


@contextmanager
def executor(
    compute: ComputeConfig, device: str, check: Callable[[], None] = lambda: None
) -> Iterator[DaskExecutor]:
    """A cluster for the block: the one at ``compute.scheduler``, or a local one that ends with it.

    ``check`` is called about once a second while results are awaited; what it raises ends the run.

    Raises:
        UsageError: a scheduler that cannot be reached, or whose workers have no GPU where one is asked for.
        SchedulerLostError: the scheduler went away before the block's end.
        WorkersLostError: local workers died and none came back.
    """
    from distributed import Client, fire_and_forget

    if compute.scheduler is not None:
        try:
            client = Client(compute.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"compute.scheduler: no Dask scheduler at {compute.scheduler}: {error}") from None
        with client, _quiet_where_lost():
            _refuse_missing_resources(client, device)
            yield DaskExecutor(client, Placement(device, torch.get_num_threads()), check)
        return
    workers = local_workers(compute, device)
    with (
        _closed(_local_cluster(compute, device, workers)) as cluster,
        _closed(Client(cluster, set_as_default=False)) as client,
    ):
        for address in cluster.scheduler_info["workers"]:
            fire_and_forget(client.submit(warm_up, workers=[address], pure=False))
        yield DaskExecutor(client, Placement(device, max(1, _cores() // workers)), check, PATIENCE_SECONDS)


def warm_up() -> None:
    """Imports in a worker what its first unit needs, while the driver still waits for the API server."""
    import timm  # noqa: F401


def local_workers(compute: ComputeConfig, device: str) -> int:
    """How many local workers: as configured, else one per GPU, else one per core up to four."""
    if compute.workers is not None:
        return compute.workers
    return torch.cuda.device_count() if device == "cuda" else min(_cores(), MOST_LOCAL_WORKERS)


def _local_cluster(compute: ComputeConfig, device: str, workers: int):  # type: ignore[no-untyped-def]
    import dask
    from distributed import LocalCluster

    # A method that needs worker processes of its own (a DataLoader) fails inside daemonic ones.
    dask.config.set(
        {
            "distributed.worker.daemon": False,
            "distributed.admin.tick.limit": "60s",
            # By default a worker that died and is not back within 15 s is taken off for good, although it is being
            # started again: on a busy machine a run would soon stand without workers.
            "distributed.deploy.lost-worker-timeout": "1000 days",
            "distributed.nanny.pre-spawn-environ": {**GLIBC, **SILENCE, "OMP_NUM_THREADS": 1},
        }
    )
    with _interrupts_held():
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            # Without a dashboard Dask still takes port 8787, and warns where another run has it.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            memory_limit=compute.memory_limit or "auto",
            resources={"GPU": 1} if device == "cuda" else None,
            silence_logs="ERROR",
        )


@contextmanager
def _closed(ours: C) -> Iterator[C]:
    """Closes what is ours at the end. What was computed is committed by then: to close late is no failed run.

    On a busy machine workers can take longer to end than Dask waits; they end with this process at the latest.
    """
    try:
        yield ours
    finally:
        with suppress(TimeoutError):
            ours.close()


@contextmanager
def _quiet_where_lost() -> Iterator[None]:
    """The run says that the scheduler is gone; Dask would add how its client was closed while it reconnected."""
    try:
        yield
    except SchedulerLostError:
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        raise


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C from what is started inside the block; this thread gets it afterwards.

    A terminal sends it to every process. Workers that end by themselves look like a defect to Dask, which
    prints tracebacks and starts new ones; the driver alone decides that the run is over.
    """
    # Python's tracker unblocks the signal where it is started: it has to run before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_missing_resources(client: object, device: str) -> None:
    """Dask would wait for ever, without a word, for a resource that no worker has."""
    workers = client.scheduler_info(n_workers=-1)["workers"]  # type: ignore[attr-defined]
    if not workers:
        raise UsageError("compute.scheduler: expected at least one worker, the scheduler has none")
    if device == "cuda" and not any(worker["resources"].get("GPU") for worker in workers.values()):
        raise UsageError(
            "run.device: expected workers with a GPU, but none was started with --resources GPU=1; "
            "start some, or set run.device to cpu"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
