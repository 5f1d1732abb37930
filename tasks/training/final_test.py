"""train_test: what trained weights come to on pictures that the training never saw."""

from __future__ import annotations

from typing import Any

from storage.commits import CommitRecord
from tasks.checkpoint import tidy
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from tasks.training.picture_file import picture_file
from tasks.training.pictures import check_labels, decode_test
from tasks.training.stage import FILE, TABLE, build, log_rows, training_of
from tasks.training.stage import STAGE as TRAIN
from xai_core.training import LogRow, evaluate, read_trained


def run(context: Context) -> Outcome:
    """Rows of ``training`` of the split ``test``; the weights are those of the file that the training left."""
    config, record = training_of(context.config), context.record(TRAIN.name)
    model, objective = build(config, context.config.model, context.device)
    weights, _ = read_trained(context.store.read_file(record, FILE))
    objective.trained.load_state_dict(weights)
    folder = context.store.root / "work"
    with picture_file(folder, model.input_size) as file:
        labels = decode_test(context, model, file)
        if config.entry.reads_labels(config.options):
            rows = ({"label": label, "reference": f"picture {row}"} for row, label in enumerate(labels.tolist()))
            check_labels(rows, model.num_classes, "training.test")
        found = evaluate(objective, (file, labels), config.recipe, context.device)
    tidy(folder)
    context.commit.table(TABLE, log_rows([_row(record, name, value) for name, value in found.items()]))
    return Outcome(len(labels), len(labels), facts=found)


def _row(record: CommitRecord, name: str, value: float) -> LogRow:
    """A measure, at the epoch and the step whose weights were taken."""
    return LogRow(record.facts["epoch"], record.facts["step"], "test", name, value)


def reads(study: Study, variant: str) -> dict[str, Any]:
    """Which pictures: the weights come to the same whatever they are tested on."""
    test, listing = training_of(study.config).test, study.test_listing
    if test is None or listing is None:
        raise RuntimeError("expected training.test: the stage has no variant without it")
    return {"path": test.path, "listing": listing.digest, "limit": test.limit}


def _variants(study: Study) -> tuple[str, ...]:
    training = study.config.training
    return ("",) if training is not None and training.test is not None else ()


STAGE = Stage(
    name="train_test",
    version=1,
    run=run,
    reads=reads,
    upstream=lambda study, variant: ((TRAIN.name, ""),),
    variants=_variants,
    sharded=False,
    summary="measures what was trained on the pictures of training.test",
)
