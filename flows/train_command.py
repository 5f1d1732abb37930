"""``vitrine train``: models to be explained, explainers that learn, and models that explain themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

from flows.config import load_config
from storage.commits import CommitRecord, Unit
from storage.files import publish
from storage.store import Store, open_store
from tasks.config import StudyConfig
from tasks.stage import Stage
from tasks.training import final_test
from tasks.training.config import TrainingConfig
from tasks.training.stage import FILE, STAGE
from xai_core.errors import UsageError
from xai_core.registry import methods, variant_id
from xai_core.training.kinds import Group, KindEntry, kinds
from xai_core.training.weights_file import digest_of

# A study is asked for its training alone; `vitrine run` does all of it.
NOTHING_ELSE = ("methods=[]", "metrics=[]", "concepts={}", "importance=null")


def train(group: Group, config: Path, overrides: list[str], output: Path, store_path: Path) -> int:
    """Trains what a config says as a study, and copies the committed weights; returns the exit code."""
    from flows.commands import COMPLETE, COMPLETE_WITH_QUARANTINE
    from flows.study import run_study

    if output.suffix != ".safetensors":
        raise UsageError(f"--output: expected a file named .safetensors, got {output.name!r}")
    chosen = _with_every_core(load_config(config, [*NOTHING_ELSE, *overrides]))
    training = _training(chosen, group)
    store = open_store(store_path, create=True)
    result = run_study(chosen, store_path)
    record = _record(store, result.run_id, STAGE)
    publish(output, lambda path: shutil.copyfile(store.read_file(record, FILE), path))
    tested = _record(store, result.run_id, final_test.STAGE) if training.test is not None else None
    _print(training.entry, record, tested, output)
    print(f"report   {result.report}")
    return COMPLETE_WITH_QUARANTINE if result.quarantined else COMPLETE


def _with_every_core(config: StudyConfig) -> StudyConfig:
    """One worker, unless the config says how many: a training is one unit, and others would hold idle cores."""
    workers = config.compute.workers or 1
    return config.model_copy(update={"compute": config.compute.model_copy(update={"workers": workers})})


def _training(config: StudyConfig, group: Group) -> TrainingConfig:
    """What a config trains, if it is of the group that is asked for."""
    known = ", ".join(entry.name for entry in kinds if entry.group == group)
    if config.training is None:
        raise UsageError(f"training: expected a section with a kind ({known}), got none; add it to the config")
    entry = config.training.entry
    if entry.group != group:
        raise UsageError(
            f"training.kind: expected {known}, got {entry.name}; use `vitrine train {entry.group}` for it"
        )
    return config.training


def _record(store: Store, run_id: str, stage: Stage) -> CommitRecord:
    run, unit = store.runs.read(run_id), Unit(stage.name)
    record = None if run is None else store.done(unit, run.units()[unit])
    if record is None:
        raise RuntimeError(f"run {run_id}: expected {stage.name} committed, found no record")
    return record


def _print(entry: KindEntry, record: CommitRecord, tested: CommitRecord | None, output: Path) -> None:
    facts = record.facts
    print(f"pictures {facts['pictures']:,}, and {facts['held_out']:,} held out")
    if facts["score"] is not None:
        print(f"score    {facts['score']:.4g} on those held out, after epoch {facts['epoch']}")
    if tested is not None:
        print(f"test     {tested.facts['score']:.4g}, the score on the test pictures")
    print(f"weights  {output}")
    print(f"digest   {digest_of(output)}")
    if entry.method is not None:
        options = methods.get(entry.method).options(checkpoint=str(output))
        print(f"method   {variant_id(entry.method, options)}")
