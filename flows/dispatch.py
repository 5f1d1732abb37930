"""Handing units to Dask workers: one a thread at a time, so that a worker's death is only ever its own unit's."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from tasks.execute import Busy, Failure, Receipt, execute
from tasks.stage import Work

LOOK_SECONDS = 1.0


class SchedulerLostError(ConnectionError):
    """The Dask scheduler went away before the run ended."""


class WorkersLostError(ConnectionError):
    """No worker was left, and none came back."""


@dataclass(frozen=True)
class Placement:
    """What every worker is told: its device kind and how many threads its arithmetic may use."""

    device: str
    threads: int


def run_on_worker(work: Work, placement: Placement) -> Receipt | Busy:
    """Runs one unit inside a Dask worker, on the worker's own GPU where there are several."""
    torch.set_num_threads(placement.threads)
    return execute(work, _own_device(placement.device))


def _own_device(device: str) -> str:
    if device != "cuda" or torch.cuda.device_count() < 2:
        return device
    from distributed import get_worker

    name = str(get_worker().name)
    return f"cuda:{int(name) % torch.cuda.device_count()}" if name.isdigit() else device


class DaskExecutor:
    """Runs works on a Dask cluster; see ``tasks.stage_task.Executor``.

    ``check`` is called about once a second while results are awaited; what it raises ends the run. ``patience``:
    for how many seconds a run waits without any worker; for ever where None.
    """

    def __init__(
        self, client: Any, placement: Placement, check: Callable[[], None], patience: float | None = None
    ) -> None:
        self._client = client
        self._placement = placement
        self._check = check
        self._patience = patience

    def run(self, works: list[Work]) -> Iterator[Receipt | Failure | Busy]:
        """Hands out all works in order and yields each result as it comes; futures are released at once.

        Raises:
            SchedulerLostError: the scheduler went away.
            WorkersLostError: there was no worker for longer than the patience.
        """
        feed = _Feed(self._client, self._placement, works, self._patience)
        try:
            while feed.unfinished:
                self._check()
                future = feed.next_ended()
                if future is not None:
                    yield _result(feed.work_of(future), future)
                    future.release()
        finally:
            feed.close()


class _Feed:
    """Keeps as many units in Dask's hands as its workers have threads.

    Dask blames a worker's death on all that was assigned to the worker, and gives up what was blamed a few
    times: a unit that waited behind a deadly one would be given up with it. The end of one unit hands out the
    next, whatever the driver is busy with.
    """

    def __init__(self, client: Any, placement: Placement, works: list[Work], patience: float | None) -> None:
        self._client = client
        self._placement = placement
        self._patience = patience
        self._seen = time.monotonic()
        self._on_gpu = placement.device == "cuda"
        self._waiting = deque(enumerate(works))
        self._running: dict[Any, Work] = {}
        self._ended: SimpleQueue[Any] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = 1
        self._asked = -LOOK_SECONDS

    @property
    def unfinished(self) -> bool:
        """Whether results are still to come."""
        return bool(self._waiting or self._running)

    def next_ended(self) -> Any | None:
        """A future that ended, or None after a second in which none did."""
        self._count_threads()
        self._hand_out()
        try:
            return self._ended.get(timeout=LOOK_SECONDS)
        except Empty:
            self._refuse_lost_scheduler()
            return None

    def work_of(self, future: Any) -> Work:
        """The work of a future that ended; it is the feed's no longer."""
        with self._lock:
            return self._running.pop(future)

    def close(self) -> None:
        """Cancels what has not ended."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for future in running:
            future.cancel()

    def _count_threads(self) -> None:
        """Workers come and go; where there is none, one unit waits for the next to come."""
        if time.monotonic() - self._asked < LOOK_SECONDS:
            return
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        except OSError:
            raise _lost(self._client) from None
        self._threads = max(1, sum(self._at_once(worker) for worker in workers))
        self._asked = time.monotonic()
        if workers:
            self._seen = self._asked
        elif self._patience is not None and self._asked - self._seen > self._patience:
            raise WorkersLostError(
                f"compute.workers: expected Dask workers as long as the study runs, got none for "
                f"{self._patience:g} s: they died and did not come back; what was committed is kept: see what "
                "else the machine does (memory, processes), and run it again"
            )

    def _at_once(self, worker: dict[str, Any]) -> int:
        """How many units a worker runs side by side."""
        threads = int(worker["nthreads"])
        return min(threads, int(worker["resources"].get("GPU", 0))) if self._on_gpu else threads

    def _hand_out(self) -> None:
        with self._lock:
            while self._waiting and not self._closed and self._under_way() < self._threads:
                position, work = self._waiting[0]
                future = self._submit(position, work)
                self._running[future] = work
                self._waiting.popleft()
                future.add_done_callback(self._on_end)

    def _under_way(self) -> int:
        return sum(future.status == "pending" for future in self._running)

    def _on_end(self, future: Any) -> None:
        self._ended.put(future)
        # What fails here fails again in the driver's own thread, which tells it.
        with suppress(Exception):
            self._hand_out()

    def _submit(self, position: int, work: Work) -> Any:
        return self._client.submit(
            run_on_worker,
            work,
            self._placement,
            pure=False,
            # Units that a worker's death throws back come before those that were not begun.
            priority=-position,
            resources={"GPU": 1} if self._on_gpu else None,
        )

    def _refuse_lost_scheduler(self) -> None:
        if self._client.status not in ("running", "connecting"):
            raise _lost(self._client)


def _result(work: Work, future: Any) -> Receipt | Failure | Busy:
    from distributed import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        return Failure(work.unit, _deadly(error))
    if error is not None:
        return Failure(work.unit, _one_line(error))
    if future.cancelled():
        raise _lost(future.client)
    result: Receipt | Busy = future.result()
    return result


def _deadly(error: Any) -> str:
    return (
        f"expected a worker to live through it, got {error.allowed_failures + 1} that died with it in hand, the "
        f"last at {error.last_worker.address}: it may need more memory than they have (lower run.batch_size or "
        "run.shard_size, raise compute.memory_limit, use fewer compute.workers), or crash a library (take the "
        "image or the method that does out of the study)"
    )


def _lost(client: Any) -> SchedulerLostError:
    address = client.scheduler.address if client.scheduler is not None else "its address"
    return SchedulerLostError(
        f"compute.scheduler: expected the Dask scheduler at {address} as long as the study runs, lost the "
        "connection; what was committed is kept: start the scheduler again"
    )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
