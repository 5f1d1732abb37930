"""importance: what trained IAs, EAs and PAs say of every image, and how right they stay without some patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.importance.config import EvaluationConfig
from tasks.importance.masks import Masks, has_masks, masks_of
from tasks.importance.networks import Network, load_network, networks_of, title
from tasks.predict import manifest_labels
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from tasks.training.pictures import check_labels
from tasks.worker import Pictures, load_pictures
from xai_core.batching import Batches, try_batches
from xai_core.errors import ImageError, NotFinite, UsageError
from xai_core.inherent.evaluation import Evaluation, evaluate_images, join_evaluations
from xai_core.inherent.patches import grid_side
from xai_core.inherent.semanticity import OF_MASKS
from xai_core.models import Classifier

ACCURACY, SCORES = "importance_accuracy", "importance_scores"
#: What to do about pictures that a network has no logit for.
REMEDY = "evaluate networks that were trained on these classes, on pictures with labels"


def run(context: Context) -> Outcome:
    """The arrays ``importance`` and ``valid``, and rows of both tables, of one network for one shard."""
    network = _network(context)
    model = load_network(network, context.device)
    everything = load_pictures(context, model)
    labels = _labels(context, model, everything)
    masks = masks_of(context, model, everything, labels)
    seen = [at for at in range(len(everything)) if at not in masks.failed]
    pictures = everything.take(seen)
    batches = _evaluate(context, model, pictures, labels[seen], masks)
    found = join_evaluations(batches.results) if batches.results else None
    failed = {**batches.failed, **_broken(batches, found)}
    good = [at for at, row in enumerate(batches.rows) if row not in failed]
    kept = pictures.take([batches.rows[at] for at in good])
    _write_importance(context, model, kept, None if found is None else found.importance[good])
    if found is not None:
        reasons = [masks.reasons[batches.rows[at]] for at in good] if masks.reasons else [None] * len(good)
        _write_rows(context, network, kept.image_ids, found.take(good), reasons)
    facts = {"title": title(model), "seed": network.seed, "digest": network.digest}
    bad = (*everything.bad, *everything.as_bad(masks.failed), *pictures.as_bad(failed))
    return Outcome(everything.given, len(kept), bad, facts)


def _network(context: Context) -> Network:
    """The network of the unit.

    Raises:
        UsageError: its file is no longer the one of the plan, under whose key results would stand.
    """
    planned = context.work.ingredients["config"]["network"]
    try:
        return next(one for one in networks_of(context.config) if one.digest == planned)
    except StopIteration:
        raise UsageError(
            f"importance.networks: expected the file with digest {planned} that the study was planned with, got "
            "others: it changed while the study ran; run it again to take the new one"
        ) from None


def _labels(context: Context, model: Classifier, pictures: Pictures) -> Tensor:
    """The pictures' labels by manifest.

    Raises:
        UsageError: a picture without one that the network has a logit for.
    """
    labels = manifest_labels(context, pictures.image_ids)
    if labels:
        named = ({"label": label, "reference": path} for label, path in zip(labels, pictures.paths, strict=True))
        check_labels(named, model.num_classes, "dataset", REMEDY)
    return torch.tensor(labels, dtype=torch.int64)


def _evaluate(
    context: Context, model: Classifier, pictures: Pictures, labels: Tensor, masks: Masks
) -> Batches[Evaluation]:
    config = context.config
    size = config.run.batch_size

    def measured(rows: slice) -> Evaluation:
        return evaluate_images(
            model,
            pictures.inputs[rows],
            labels[rows],
            None if masks.values is None else masks.values[rows],
            thresholds=_section(config.importance).thresholds,
            batch_size=size,
            precision=config.run.precision,
        )

    return try_batches(measured, len(pictures), size)


def _section(section: EvaluationConfig | None) -> EvaluationConfig:
    assert section is not None, "the stage has no variant without one"
    return section


def _broken(batches: Batches[Evaluation], found: Evaluation | None) -> dict[int, ImageError]:
    finite = [] if found is None else found.finite.tolist()
    return {
        row: NotFinite("the network gave importance or logits that are NaN or infinite")
        for row, good in zip(batches.rows, finite, strict=True)
        if not good
    }


def _write_importance(context: Context, model: Classifier, kept: Pictures, importance: Tensor | None) -> None:
    config: Any = model.module.config
    side = grid_side(config.img_size, config.patch_size)
    values = torch.zeros(0, side, side) if importance is None else importance
    context.write_array("importance", kept.rows, values.numpy(), ("y", "x"), patch_size=config.patch_size)
    context.write_valid(kept.rows)


def _write_rows(
    context: Context,
    network: Network,
    image_ids: np.ndarray,
    found: Evaluation,
    unknown: Sequence[str | None],
) -> None:
    """A row for every picture and trial, and one for every metric and picture.

    Args:
        unknown: of every picture why nothing is known of its object, None where something is.
    """
    count, trials = len(image_ids), found.trials
    rows = count * len(trials)
    accuracy = {
        "image_id": np.repeat(image_ids, len(trials)),
        "network": [network.id] * rows,
        "kind": [network.kind] * rows,
        "patch_size": [network.patch_size] * rows,
        "direction": [trial.direction for trial in trials] * count,
        "threshold": [trial.threshold for trial in trials] * count,
        "correct": found.correct.flatten().numpy(),
        "masked": found.masked.flatten().numpy(),
    }
    context.commit.table(ACCURACY, rows_to_table(ACCURACY, accuracy))
    for_masks = dict.fromkeys(OF_MASKS, unknown)
    reasons = {
        name: [known or why for known, why in zip(for_masks.get(name, [None] * count), told, strict=True)]
        for name, told in found.reasons.items()
    }
    context.commit.table(SCORES, score_rows(network.id, image_ids, found.scores, reasons))


def score_rows(  # type: ignore[no-untyped-def]
    name: str, image_ids: np.ndarray, scores: Mapping[str, Tensor], reasons: Mapping[str, Sequence[str | None]]
):
    """Rows of ``importance_scores``, metric by metric: values ``[n]`` (NaN: undefined) and why one has none."""
    values = [value for one in scores.values() for value in one.tolist()]
    columns = {
        "image_id": np.tile(image_ids, len(scores)),
        "network": [name] * len(values),
        "metric": [metric for metric, one in scores.items() for _ in range(len(one))],
        "value": [None if value != value else value for value in values],
        "reason": [why for metric in scores for why in reasons[metric]],
    }
    return rows_to_table(SCORES, columns)


def reads(study: Study, variant: str) -> dict[str, Any]:
    """What is in the network's file, the thresholds, and what is known of objects."""
    config = study.config
    truth = None
    if has_masks(config):
        told = config.truth.model_dump(mode="json", exclude={"masks", "boxes"})
        truth = {"kind": config.dataset.kind, **told, "files": study.truth_files}
    return {
        "network": next(network.digest for network in study.networks if network.id == variant),
        "thresholds": list(_section(config.importance).thresholds),
        "truth": truth,
        "precision": config.run.precision,
    }


STAGE = Stage(
    name="importance",
    version=2,
    run=run,
    reads=reads,
    upstream=lambda study, variant: (("manifest", ""),),
    variants=lambda study: tuple(network.id for network in study.networks),
    # It asks the networks, never the study's model.
    reads_model=False,
    summary="evaluates networks that weigh their patches",
)
