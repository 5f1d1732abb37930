"""predict: what the model says of every image, and the target class that all explanations are about."""

from __future__ import annotations

import numpy as np
import torch

from storage.schema import rows_to_table
from tasks.config import DatasetConfig
from tasks.stage import Context, Outcome, Stage
from tasks.worker import load_pictures, study_classifier
from xai_core.batching import try_batches
from xai_core.errors import ImageError, NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.precision import precision_context

TOP = 5


def run(context: Context) -> Outcome:
    """Rows of ``predictions`` (top 5) and ``targets`` for one shard; without finite logits there are none."""
    everything = load_pictures(context)
    model = study_classifier(context)
    logits, failed = _predict_logits(context, model, everything.inputs)
    pictures = everything.take([row for row in range(len(everything)) if row not in failed])
    labels = _labels(context, pictures.image_ids)
    top1 = logits.argmax(dim=1).cpu().numpy() if len(logits) else np.zeros(0, np.int64)
    targets = labels if context.config.target == "label" else top1
    names = class_names(context, model)
    correct = _correct(context, top1, labels)
    context.commit.table("predictions", _prediction_rows(pictures.image_ids, logits, names))
    context.commit.table("targets", _target_rows(pictures.image_ids, targets, names, correct))
    facts = {"correct": sum(map(bool, correct)) if context.work.facts["labels_are_classes"] else None}
    bad = (*everything.bad, *everything.as_bad(failed))
    return Outcome(everything.given, len(pictures), bad, facts)


def _predict_logits(
    context: Context, model: Classifier, inputs: torch.Tensor
) -> tuple[torch.Tensor, dict[int, ImageError]]:
    """Finite logits ``[m, C]`` of the inputs ``[n, 3, H, W]``, in their order, and those that have none."""
    run = context.config.run
    with torch.no_grad(), precision_context(run.precision, context.device):
        batches = try_batches(lambda rows: model(inputs[rows]).float(), len(inputs), run.batch_size)
    if not batches.rows:
        return torch.zeros(0, model.num_classes), batches.failed
    logits = torch.cat(batches.results)
    finite = logits.isfinite().all(dim=1)
    broken: dict[int, ImageError] = {
        row: NotFinite("the model gave logits that are NaN or infinite")
        for row, good in zip(batches.rows, finite.tolist(), strict=True)
        if not good
    }
    return logits[finite], {**batches.failed, **broken}


def class_names(context: Context, model: Classifier) -> tuple[str, ...]:
    """Readable names of the model's classes, see :func:`names_of_classes`."""
    return names_of_classes(context.config.dataset, model, bool(context.work.facts["labels_are_classes"]))


def names_of_classes(dataset: DatasetConfig, model: Classifier, labels_are_classes: bool) -> tuple[str, ...]:
    """Readable names of the model's classes: timm's, else the data set's, else their numbers."""
    from tasks.sources import open_source

    names = model.class_names
    if names is None and labels_are_classes:
        names = open_source(dataset).class_names
    if names is None or len(names) < model.num_classes:
        return tuple(str(index) for index in range(model.num_classes))
    return names


def manifest_labels(context: Context, image_ids: np.ndarray) -> list[int | None]:
    """The labels of some of the shard's pictures, None where there is none."""
    manifest = context.store.read_table(context.record("manifest"), "manifest")
    label_of = dict(zip(manifest["image_id"].to_pylist(), manifest["label"].to_pylist(), strict=True))
    return [label_of[image_id] for image_id in image_ids.tolist()]


def _labels(context: Context, image_ids: np.ndarray) -> np.ndarray:
    """The pictures' labels by manifest; -1 where there is none.

    Raises:
        UsageError: labels are the targets and an image has none.
    """
    labels = manifest_labels(context, image_ids)
    if context.config.target == "label" and None in labels:
        raise UsageError(
            f"target: 'label' needs a label for every image, image {image_ids[labels.index(None)]} has none; "
            "add it, or explain the model's own prediction with target: top1"
        )
    return np.array([-1 if label is None else label for label in labels], np.int64)


def _correct(context: Context, top1: np.ndarray, labels: np.ndarray) -> list[bool | None]:
    if not context.work.facts["labels_are_classes"]:
        return [None] * len(top1)
    return [bool(one) for one in top1 == labels]


def _target_rows(  # type: ignore[no-untyped-def]
    image_ids: np.ndarray, targets: np.ndarray, names: tuple[str, ...], correct: list[bool | None]
):
    return rows_to_table(
        "targets",
        {
            "image_id": image_ids,
            "target": targets,
            "target_name": [names[target] for target in targets],
            "correct": correct,
        },
    )


def _prediction_rows(image_ids: np.ndarray, logits: torch.Tensor, names: tuple[str, ...]):  # type: ignore[no-untyped-def]
    count = min(TOP, logits.shape[1])
    values, classes = logits.topk(count, dim=1)
    probabilities = logits.softmax(dim=1).gather(1, classes)
    chosen = classes.flatten().tolist()
    return rows_to_table(
        "predictions",
        {
            "image_id": np.repeat(image_ids, count),
            "rank": np.tile(np.arange(1, count + 1), len(image_ids)),
            "class_id": chosen,
            "class_name": [names[one] for one in chosen],
            "logit": values.flatten().cpu().numpy(),
            "prob": probabilities.flatten().cpu().numpy(),
        },
    )


STAGE = Stage(
    name="predict",
    version=2,
    run=run,
    reads=lambda study, variant: {
        "target": study.config.target,
        "labels_are_classes": study.labels_are_classes,
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (("manifest", ""),),
    summary="top-5 classes and the target",
)
