"""Trainings and the files that they leave: what cannot be trained or read is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tasks.study import Study
from tasks.training.pictures import check_labels, listed
from tasks.training.stage import build
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import MethodEntry
from xai_core.training import Objective, Recipe, evaluate, kinds_of_method, model_digest, read_about


def check_training(study: Study, model: Classifier) -> None:
    """Builds what a study trains, and looks at every label that it is to learn.

    Raises:
        UsageError: options that do not fit the model, or pictures without a label that the model has a logit for.
    """
    training = study.config.training
    if training is None:
        return
    try:
        _, objective = build(training, study.config.model, "cpu")
        _try(objective, training.recipe, model)
    except UsageError as error:
        raise UsageError(f"training.kind: {error}") from None
    if training.entry.reads_labels(training.options):
        check_labels(listed(study.listing, study.config.dataset.limit), model.num_classes, "dataset")
        if training.test is not None and study.test_listing is not None:
            rows = listed(study.test_listing, training.test.limit)
            check_labels(rows, model.num_classes, "training.test")


def _try(objective: Objective, recipe: Recipe, model: Classifier) -> None:
    """One blank picture through all of it: what does not fit together shows before the pictures are read."""
    blank = torch.zeros(1, 3, *model.input_size, dtype=torch.uint8)
    try:
        evaluate(objective, (blank, torch.zeros(1, dtype=torch.long)), recipe)
    except UsageError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = model.input_size
        raise UsageError(
            f"expected a model and options that take pictures of {height} x {width}, three colours, got from "
            f"{model.spec.name}: {error}; look at model.create_args and the kind's options"
        ) from None


def check_files(model: Classifier, entry: MethodEntry, options: Any) -> None:
    """Looks at the checkpoint of a method that has one, and of the method that it is computed from.

    Raises:
        UsageError: no such file, no checkpoint, one of another kind, or one for another model.
    """
    for one, of in _computed_from(entry, options):
        kinds = kinds_of_method(one.name)
        if kinds:
            read_about(of.checkpoint, kinds=kinds, weights=model_digest(model))


def _computed_from(entry: MethodEntry, options: Any) -> Iterator[tuple[MethodEntry, Any]]:
    yield entry, options
    if entry.wraps is not None:
        yield from _computed_from(*entry.wraps(options))
