"""metrics: all metrics of one method over a shard, each distinct perturbed image forwarded once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.config import options_of
from tasks.labels import read_maps, read_part_labels
from tasks.stage import Context, Outcome, Stage
from tasks.targets import read_targets
from tasks.worker import load_pictures, study_classifier
from xai_core.metrics import Evaluation, evaluate
from xai_core.precision import precision_context
from xai_core.registry import metrics


def run(context: Context) -> Outcome:
    """Rows of ``metrics`` and ``curves`` of one method for one shard."""
    method = context.work.unit.variant
    pictures = load_pictures(context)
    maps, has_map = read_maps(context, method, pictures)
    labels, has_parts = read_part_labels(context, pictures)
    chosen = (has_map & has_parts).nonzero().squeeze(1)
    given = len(chosen) + len(pictures.bad)
    if not len(chosen):
        return Outcome(given, 0, pictures.bad)
    config = context.config
    with precision_context(config.run.precision, context.device):
        evaluation = evaluate(
            study_classifier(context),
            pictures.inputs[chosen],
            read_targets(context, pictures)[chosen].to(context.device),
            maps[chosen],
            labels[chosen],
            [(metrics.get(choice.name), options_of(metrics, choice)) for choice in config.metrics],
            part_scores=_part_scores(context, method, pictures.image_ids[chosen.numpy()]),
            batch_size=config.run.batch_size,
        )
    image_ids = pictures.image_ids[chosen.numpy()]
    context.commit.table("metrics", _metric_rows(method, image_ids, evaluation))
    context.commit.table("curves", _curve_rows(method, image_ids, evaluation))
    return Outcome(given, len(chosen), pictures.bad)


def _part_scores(context: Context, method: str, image_ids: np.ndarray) -> Tensor | None:
    """A part method's own scores ``[n, K]`` (NaN: no such part), or None for pixel methods."""
    record = context.record("attribute", method)
    rows = context.store.read_table(record, "part_scores")
    if rows.num_rows == 0:
        return None
    position = {image_id: index for index, image_id in enumerate(image_ids.tolist())}
    table = torch.full(
        (len(image_ids), int(np.max(rows["part_id"].to_numpy())) + 1), torch.nan, dtype=torch.float64
    )
    columns = (rows[name].to_pylist() for name in ("image_id", "part_id", "score"))
    for image_id, part_id, score in zip(*columns, strict=True):
        if image_id in position:
            table[position[image_id], part_id] = score
    return table


def _metric_rows(method: str, image_ids: np.ndarray, evaluation: Evaluation):  # type: ignore[no-untyped-def]
    count = len(image_ids)
    values = [value for tensor in evaluation.values.values() for value in tensor.tolist()]
    return rows_to_table(
        "metrics",
        {
            "image_id": np.tile(image_ids, len(evaluation.values)),
            "method": [method] * len(values),
            "metric": [name for name in evaluation.values for _ in range(count)],
            "value": [None if value != value else value for value in values],
        },
    )


def _curve_rows(method: str, image_ids: np.ndarray, evaluation: Evaluation):  # type: ignore[no-untyped-def]
    ids, names, steps, fractions, probs = [], [], [], [], []
    for name, curve in evaluation.curves.items():
        image, step = (~curve.prob.isnan()).nonzero(as_tuple=True)
        ids.append(image_ids[image.cpu().numpy()])
        names += [name] * len(image)
        steps.append(step.cpu().numpy())
        fractions.append(curve.fraction[image, step].cpu().numpy())
        probs.append(curve.prob[image, step].cpu().numpy().astype(np.float32))
    return rows_to_table(
        "curves",
        {
            "image_id": np.concatenate(ids),
            "method": [method] * len(names),
            "curve": names,
            "step": np.concatenate(steps),
            "fraction": np.concatenate(fractions),
            "prob": np.concatenate(probs),
        },
    )


STAGE = Stage(
    name="metrics",
    version=1,
    run=run,
    reads=lambda study, variant: {
        "metrics": [choice.model_dump(mode="json") for choice in study.config.metrics],
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (
        ("manifest", ""),
        ("predict", ""),
        ("parts", ""),
        ("attribute", variant),
    ),
    variants=lambda study: tuple(choice.id for choice in study.config.methods) if study.config.metrics else (),
    summary="measures every explanation",
)
