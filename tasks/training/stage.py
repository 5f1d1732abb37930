"""train: something learns from the study's pictures, and leaves its weights and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.checkpoint import Checkpoint
from tasks.config import ModelConfig, StudyConfig
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study, with_digests
from tasks.training.config import TrainingConfig
from tasks.training.picture_file import PictureFile, picture_file
from tasks.training.pictures import (
    Dealt,
    Decoded,
    check_labels,
    deal,
    decode_study,
    labelled,
)
from tasks.training.told import Telling, Word, telling
from tasks.worker import classifier
from xai_core.errors import UsageError
from xai_core.models import Classifier, load_classifier
from xai_core.training import LogRow, Objective, Training
from xai_core.training.weights_file import model_digest, trained_bytes

# Steps between two looks at whether a checkpoint is due.
LOOK_STEPS = 5
#: The file of the weights, and the table of the log.
FILE, TABLE = "trained", "training"
# What a checkpoint's pictures were, beside the training's own state.
_CONTENT = "study.pictures"


def build(training: TrainingConfig, model: ModelConfig, device: str) -> tuple[Classifier, Objective]:
    """What is to be trained on a device, new, and the model that it is or that it is about.

    Raises:
        UsageError: the kind's options do not fit the model.
    """
    entry, seed = training.entry, training.recipe.seed
    if entry.own_model:
        found = load_classifier(replace(model.spec(), seed=seed), device)
    else:
        found = classifier(model.model_dump_json(), device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return found, entry.function(found, training.options)


def run(context: Context) -> Outcome:
    """The file ``trained`` and rows of ``training``; one that was killed goes on from its last checkpoint."""
    config = training_of(context.config)
    model, objective = build(config, context.config.model, context.device)
    folder = context.store.root / "work"
    with ExitStack() as held:
        told = held.enter_context(telling(folder, context.work.key))
        file = held.enter_context(picture_file(folder, model.input_size))
        decoded = decode_study(context, model, file, told)
        _check(config, decoded, model)
        dealt = deal(decoded.digests, config.held_out, config.held_out_seed)
        training, begun = _train(context, objective, file, decoded, dealt, told)
        weights = training.weights()
    score = _score(training)
    _write(context, model, weights, training.log, {"epoch": training.best_epoch, "score": score})
    # The record is all that is left to write: were it lost, the training would be done again, to the same end.
    Checkpoint(context.store, context.work.key).remove()
    given, bad = len(decoded.labels) + len(decoded.bad), tuple(decoded.bad)
    counts = {"pictures": len(dealt.train), "held_out": len(dealt.held_out)}
    best = {"epoch": training.best_epoch, "step": training.best_epoch * training.steps_per_epoch, "score": score}
    facts = {**counts, "resumed_at": begun, **best}
    return Outcome(given, len(decoded.labels), bad, facts)


def training_of(config: StudyConfig) -> TrainingConfig:
    """The section of a study that trains something."""
    assert config.training is not None, "the stage has no variant without one"
    return config.training


def _check(config: TrainingConfig, decoded: Decoded, model: Classifier) -> None:
    if config.entry.reads_labels(config.options):
        rows = zip(decoded.labels, decoded.digests, strict=True)
        named = ({"label": label, "reference": f"the picture with digest {digest[:12]}"} for label, digest in rows)
        check_labels(named, model.num_classes, "dataset")


def _train(
    context: Context, objective: Objective, file: PictureFile, decoded: Decoded, dealt: Dealt, told: Telling
) -> tuple[Training, int]:
    """The training at its end, and the step that it began at: that of its checkpoint, else 0."""
    config = training_of(context.config)
    checkpoint = Checkpoint(context.store, context.work.key)
    pictures = torch.frombuffer(bytearray(decoded.content.encode()), dtype=torch.uint8)
    held_out = labelled(file, decoded.labels, dealt.held_out) if dealt.held_out else None
    training = Training(
        objective,
        *labelled(file, decoded.labels, dealt.train),
        config.recipe,
        held_out=held_out,
        device=context.device,
        state=_state(checkpoint, pictures),
    )
    begun = training.step
    while not training.done:
        with last_good(checkpoint):
            training.advance(LOOK_STEPS)
            # A step's weights are looked at when the next one uses them, or here.
            state = training.state() if checkpoint.due else None
        told.tell(Word("steps", training.step, training.steps, _remark(training, config.recipe.epochs)))
        if state is not None:
            checkpoint.write({**state, _CONTENT: pictures})
    return training, begun


def _state(checkpoint: Checkpoint, pictures: Tensor) -> dict[str, Tensor] | None:
    """The checkpoint's state if it is of just these pictures: some may have become unreadable since."""
    state = checkpoint.read()
    if state is None or _CONTENT not in state or not torch.equal(state[_CONTENT], pictures):
        return None
    return state


@contextmanager
def last_good(checkpoint: Checkpoint) -> Iterator[None]:
    """Tells of numbers that are none with the checkpoint before them, and what to do."""
    try:
        yield
    except UsageError as error:
        where = f" ({checkpoint.path})" if checkpoint.path.exists() else ""
        raise UsageError(
            f"{error}{where}; the same command goes on from it, to the same end: with "
            "--set training.recipe.learning_rate=... it begins anew"
        ) from None


def _remark(training: Training, epochs: int) -> str:
    """The epoch under way, and what the last whole one came to."""
    shown = [row for row in training.log if row.epoch == training.epoch and row.name in ("loss", "score")]
    values = ", ".join(f"{row.split.replace('_', '-')} {row.name} {row.value:.3g}" for row in shown)
    return f"epoch {min(training.epoch + 1, epochs)}/{epochs}{f', {values}' if values else ''}"


def _score(training: Training) -> float | None:
    """The held-out score of the weights that are taken, or None where nothing is held out."""
    found = [
        row.value
        for row in training.log
        if (row.split, row.name, row.epoch) == ("held_out", "score", training.best_epoch)
    ]
    return found[0] if found else None


def _write(
    context: Context,
    model: Classifier,
    weights: dict[str, Tensor],
    log: Sequence[LogRow],
    result: dict[str, Any],
) -> None:
    context.commit.table(TABLE, log_rows(log))
    about = header(training_of(context.config), model, context.work.ingredients["model"])
    context.commit.file(FILE, ".safetensors", trained_bytes(weights, {**about, **result}))


def header(training: TrainingConfig, model: Classifier, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """What a trained file says of itself before anything is known of how the training went.

    Args:
        of_model: the model's ingredients of keys (:func:`tasks.study.describe_model`).
    """
    return {
        "kind": training.kind.name,
        "config": json.loads(json.dumps(dict(training.entry.config(model, training.options)))),
        "weights": model_digest(model) if training.entry.explains_model else None,
        "model": of_model,
        "recipe": asdict(training.recipe),
    }


def log_rows(log: Sequence[LogRow]) -> pa.Table:
    """Rows of the table ``training``."""
    names = list(LogRow.__dataclass_fields__)
    columns = dict(zip(names, map(list, zip(*map(astuple, log), strict=True)), strict=True))
    return rows_to_table(TABLE, columns)


def reads(study: Study, variant: str) -> dict[str, Any]:
    """The kind with its options, the recipe, and which pictures are held out."""
    config = training_of(study.config)
    return {
        "kind": config.kind.name,
        "options": with_digests(config.kind.options),
        "recipe": asdict(config.recipe),
        "held_out": [config.held_out, config.held_out_seed],
    }


STAGE = Stage(
    name="train",
    version=2,
    run=run,
    reads=reads,
    upstream=lambda study, variant: (("manifest", ""),),
    variants=lambda study: ("",) if study.config.training is not None else (),
    sharded=False,
    summary="trains what the config's section training names",
)
