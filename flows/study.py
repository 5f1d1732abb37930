"""A study as a Prefect flow: one task per stage, shards on Dask, truth in the store."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.preflight import check_study
from flows.progress import NoProgress
from flows.versions import versions
from storage.commits import Unit
from storage.compact import compact
from storage.files import remove_leftovers
from storage.runs import RunRecord, now
from storage.store import Store, open_store
from tasks.config import StudyConfig
from tasks.execute import Busy, Failure, Receipt
from tasks.leaderboard import leaderboard, leaderboard_markdown
from tasks.pipeline import STAGES
from tasks.plan import Planned, Planner
from tasks.stage import Work
from tasks.stage_task import Executor, Progress, StageSummary, run_stage, stage_task
from tasks.study import Study
from tasks.worker import resolve_device
from xai_core.registry import methods, metrics

if TYPE_CHECKING:
    from flows.api import Api

PREFECT_FOLDER = "prefect"


@dataclass(frozen=True)
class RunResult:
    """How a run ended: what each stage did, and how many distinct images were set aside."""

    run_id: str
    stages: tuple[StageSummary, ...]
    quarantined: int
    report: Path

    @property
    def executed(self) -> int:
        """Units that were run; 0 where everything had been done before."""
        return sum(stage.executed for stage in self.stages)


def run_study(config: StudyConfig, store_path: Path) -> RunResult:
    """Runs what is not done of a study: with nothing to do, neither Prefect nor Dask is started.

    Raises:
        UsageError: the study cannot be run as configured; nothing was computed.
        StageError: some units failed; the others are committed.
    """
    store = open_store(store_path, create=True)
    study = Study(config, store)
    with store.running(study.run_id), stopped_by_signals():
        if nothing_to_do(Planner(study).all()):
            return conduct(study, NothingToRun(), NoProgress(), tasks=False)
        return _orchestrate(study)


def nothing_to_do(planned: list[Planned]) -> bool:
    """Whether every unit of a plan is done."""
    return all(one.reason is None for one in planned)


class NothingToRun:
    """The executor of a run whose every unit is done already, its own or another run's."""

    def run(self, works: list[Work]) -> Iterator[Receipt | Failure | Busy]:
        """Refuses: it is only handed out where a plan was empty."""
        raise RuntimeError(f"expected nothing to run, got {len(works)} units")


def _orchestrate(study: Study) -> RunResult:
    """Checks the study and starts the cluster while the API server boots, then runs the flow."""
    from flows.api import prefect_api
    from flows.cluster import executor

    remove_leftovers(study.store.root)
    with study.store.own_folder(PREFECT_FOLDER) as home, prefect_api(home) as api:
        check_study(study)
        device = resolve_device(study.config.run.device)
        with executor(study.config.compute, device, api.check) as dask:
            api.wait()
            return _as_flow(study, dask, api)


def _as_flow(study: Study, executor: Executor, api: Api) -> RunResult:
    """The run inside a Prefect flow of its own.

    Raises:
        ApiError: the API went away before the run was complete.
    """
    from prefect import flow

    from flows.progress import ArtifactProgress, Several, console_progress
    from flows.unheeded import Unheeded
    from flows.watch import Watch

    @flow(name="vitrine-study", flow_run_name=study.run_id, validate_parameters=False)
    def study_flow(run_id: str, store: str) -> None:
        shown = console_progress()
        try:
            progress = Several([shown, Unheeded(ArtifactProgress(run_id), api.trouble)])
            training = study.config.training is not None
            with Watch(study.store, study.run_id, shown) if training else nullcontext():
                results.append(conduct(study, executor, progress, tasks=True))
        finally:
            shown.close()
        _leaderboard_artifact(study)

    results: list[RunResult] = []
    try:
        study_flow(study.run_id, str(study.store.root))
    except Exception as error:
        trouble = api.trouble(error)
        if trouble is None:
            raise
        if not results:
            raise trouble from None
        print(f"the run is complete, but Prefect was not told: {trouble}", file=sys.stderr)
    return results[0]


def conduct(study: Study, executor: Executor, progress: Progress, *, tasks: bool) -> RunResult:
    """Runs all stages in order and keeps the run record; each stage is a Prefect task when ``tasks``."""
    book = RunBook(study)
    planner = Planner(study)
    summaries = []
    try:
        # A stage of which the config names nothing is not shown as one that ran.
        for stage in (one for one in STAGES.values() if one.variants(study)):
            run = stage_task(stage) if tasks else run_stage
            summaries.append(run(stage, planner, executor, progress, book.note_keys))
    except KeyboardInterrupt:
        book.close("interrupted")
        raise
    except BaseException:
        book.close("failed")
        raise
    quarantined = _quarantined(study)
    # It saves readers time and holds nothing of its own: without room for it the run is as good.
    with suppress(OSError):
        compact(study.store, study.store.results(study.run_id).records())
    book.close("complete", quarantined=quarantined)
    return RunResult(study.run_id, tuple(summaries), quarantined, report_path(study.store, study.run_id))


class RunBook:
    """Keeps a run's record in the store while it goes."""

    def __init__(self, study: Study) -> None:
        self._store = study.store
        before = self._store.runs.read(study.run_id)
        self._run = RunRecord(
            run_id=study.run_id,
            name=study.config.name,
            config=study.config.model_dump(mode="json"),
            versions=versions(),
            created=before.created if before else now(),
            facts={
                "model": study.config.model.name,
                "images": study.images,
                "listing": study.listing.path.stem,
            },
            keys=before.keys if before else {},
            tables=_info_tables(study.config),
        )
        self._store.runs.write(self._run)

    def note_keys(self, keys: dict[Unit, str]) -> None:
        """Adds the units of a stage, before they run: SQL then sees each as soon as it is committed."""
        self._run = self._run.with_keys(keys)
        self._store.runs.write(self._run)

    def close(self, state: str, **facts: Any) -> None:
        """Writes how the run ended."""
        self._run = replace(self._run, state=state, updated=now(), facts={**self._run.facts, **facts})
        # On a full disk even this fails; what is told then is why the run failed.
        with suppress(OSError) if state == "failed" else nullcontext():
            self._store.runs.write(self._run)


def _info_tables(config: StudyConfig) -> dict[str, list[dict[str, Any]]]:
    """What the run's methods and metrics are, as rows of ``method_info`` and ``metric_info``."""
    return {
        "metric_info": [
            {
                "metric": choice.id,
                "higher_is_better": entry.higher_is_better,
                "lower_bound": entry.bounds[0],
                "upper_bound": entry.bounds[1],
                "unit": entry.unit,
                "family": entry.family,
                "definition": entry.definition,
                "undefined": entry.undefined,
                "paper": entry.paper,
            }
            for choice in config.metrics
            for entry in [metrics.get(choice.name)]
        ],
        "method_info": [
            {
                "method": choice.id,
                "output": entry.output,
                "families": ", ".join(entry.families),
                "definition": entry.summary,
                "equation": entry.equation,
                "cost": entry.cost,
                "paper": entry.paper,
            }
            for choice in config.methods
            for entry in [methods.get(choice.name)]
        ],
    }


def _quarantined(study: Study) -> int:
    """Distinct images that any stage set aside."""
    store = study.store
    bad: set[int] = set()
    for _, record in store.records([study.run_id]):
        if record.facts["quarantined"]:
            bad.update(store.read_table(record, "quarantine")["image_id"].to_pylist())
    return len(bad)


def report_path(store: Store, run_id: str) -> Path:
    """The committed report of a run.

    Raises:
        FileNotFoundError: the run has none.
    """
    run = store.runs.read(run_id)
    for unit, key in run.units().items() if run else ():
        if unit.stage == "report" and (record := store.done(unit, key)) is not None:
            return store.read_file(record, "report")
    raise FileNotFoundError(f"run {run_id} has no report: resume it with `vitrine run`")


def _leaderboard_artifact(study: Study) -> None:
    from prefect.artifacts import create_markdown_artifact

    rows = leaderboard(study.store, study.run_id)
    create_markdown_artifact(leaderboard_markdown(rows), key="leaderboard", description=study.run_id)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turns a polite end (SIGTERM) into the same clean stop as Ctrl-C, where signals can be set."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # Not the main thread: a Prefect worker handles signals itself.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
