"""metrics: all metrics of one method over a shard, each distinct perturbed image forwarded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.concept_fit import fit_of, read_fitted
from tasks.config import Choice, options_of
from tasks.labels import images_with_map, images_with_parts, read_maps, read_part_labels
from tasks.stage import Context, Outcome, Stage
from tasks.study import with_digests
from tasks.targets import predicted_pictures, read_targets
from tasks.truth import NEEDS, read_truth, reads_truth
from tasks.worker import Pictures, study_classifier
from xai_core.attribution.explainer import Explainer
from xai_core.batching import Batches, try_batches
from xai_core.errors import ImageError, NotFinite
from xai_core.metrics import Evaluation, Evidence, evaluate, join_evaluations
from xai_core.registry import methods, metrics


def run(context: Context) -> Outcome:
    """Rows of ``metrics`` and ``curves`` of one method for one shard.

    An image with a value that is neither a number nor undefined by the metric's definition is set aside.
    """
    method = context.work.unit.variant
    explained = images_with_parts(context) & images_with_map(context, method)
    pictures = predicted_pictures(context).of_images(explained)
    batches = _evaluate(context, method, pictures)
    if not batches.results:
        return Outcome(pictures.given, 0, (*pictures.bad, *pictures.as_bad(batches.failed)))
    evaluation = join_evaluations(batches.results)
    broken = _broken(evaluation)
    failed = {**batches.failed, **{batches.rows[position]: error for position, error in broken.items()}}
    kept = pictures.take([row for row in batches.rows if row not in failed])
    positions = [position for position in range(len(batches.rows)) if position not in broken]
    context.commit.table("metrics", _metric_rows(method, kept.image_ids, evaluation, positions))
    if evaluation.curves:
        context.commit.table("curves", _curve_rows(method, kept.image_ids, evaluation, positions))
    return Outcome(pictures.given, len(kept), (*pictures.bad, *pictures.as_bad(failed)))


def _evaluate(context: Context, method: str, pictures: Pictures) -> Batches[Evaluation]:
    """All pictures at once, since their (image, step) pairs are cut into batches; fewer where they do not fit."""
    config = context.config
    if not len(pictures):
        return Batches()
    model = study_classifier(context)
    targets = read_targets(context, pictures)
    maps, labels = read_maps(context, method, pictures), read_part_labels(context, pictures)
    scores = _part_scores(context, method, pictures.image_ids)
    chosen = [(metrics.get(choice.name), options_of(metrics, choice)) for choice in config.metrics]
    explainer = _explainer(context, method)
    truth, unknown = read_truth(context, pictures)
    of_truth = [
        one.id
        for one, (entry, options) in zip(config.metrics, chosen, strict=True)
        if not set(NEEDS).isdisjoint(entry.all_needs(options))
    ]

    def measure(rows: slice) -> Evaluation:
        evidence = Evidence(
            model,
            pictures.inputs[rows],
            targets[rows],
            maps[rows],
            parts=labels[rows],
            part_scores=None if scores is None else scores[rows],
            truth=truth.of(rows),
            explainer=explainer,
            batch_size=config.run.batch_size,
            precision=config.run.precision,
        )
        return _where_known(evaluate(evidence, chosen), of_truth, unknown[rows])

    return try_batches(measure, len(pictures), len(pictures))


def _where_known(evaluation: Evaluation, of_truth: Sequence[str], unknown: Sequence[str | None]) -> Evaluation:
    """The same without values ``of_truth`` that nobody knows; ``unknown`` says why, None where they are known."""
    nowhere = torch.tensor([reason is not None for reason in unknown])
    values = {
        name: torch.where(nowhere.to(evaluation.values[name].device), torch.nan, evaluation.values[name])
        for name in of_truth
    }
    broken = {name: evaluation.broken[name] & ~nowhere.to(evaluation.broken[name].device) for name in of_truth}
    reasons = {
        name: tuple(why or told for why, told in zip(unknown, evaluation.reasons[name], strict=True))
        for name in of_truth
    }
    return replace(
        evaluation,
        values={**evaluation.values, **values},
        reasons={**evaluation.reasons, **reasons},
        broken={**evaluation.broken, **broken},
    )


def _explainer(context: Context, method: str) -> Explainer:
    """The method as it made the maps, for the metrics that ask it again."""
    choice = next(one for one in context.config.methods if one.id == method)
    run = context.config.run
    return Explainer(choice.name, options_of(methods, choice), read_fitted(context), run.batch_size, run.precision)


def _broken(evaluation: Evaluation) -> dict[int, ImageError]:
    """The positions of images with a value that is not finite although it is defined, and which values."""
    found: dict[int, list[str]] = {}
    for name, broken in evaluation.broken.items():
        for position in broken.nonzero().flatten().tolist():
            found.setdefault(position, []).append(name)
    return {
        position: NotFinite(f"NaN or infinity in {', '.join(names)}, where the definition knows a number")
        for position, names in found.items()
    }


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


def _metric_rows(  # type: ignore[no-untyped-def]
    method: str, image_ids: np.ndarray, evaluation: Evaluation, positions: list[int]
):
    """Values at some positions of the evaluation, which are those of ``image_ids``."""
    count = len(image_ids)
    values = [value for tensor in evaluation.values.values() for value in tensor[positions].tolist()]
    return rows_to_table(
        "metrics",
        {
            "image_id": np.tile(image_ids, len(evaluation.values)),
            "method": [method] * len(values),
            "metric": [name for name in evaluation.values for _ in range(count)],
            "value": [None if value != value else value for value in values],
            "reason": [told[position] for told in evaluation.reasons.values() for position in positions],
        },
    )


def _curve_rows(  # type: ignore[no-untyped-def]
    method: str, image_ids: np.ndarray, evaluation: Evaluation, positions: list[int]
):
    """Curves at some positions of the evaluation, which are those of ``image_ids``."""
    ids, names, steps, fractions, probs = [], [], [], [], []
    for name, curve in evaluation.curves.items():
        fraction, prob = curve.fraction[positions], curve.prob[positions]
        image, step = (~prob.isnan()).nonzero(as_tuple=True)
        ids.append(image_ids[image.cpu().numpy()])
        names += [name] * len(image)
        steps.append(step.cpu().numpy())
        fractions.append(fraction[image, step].cpu().numpy())
        probs.append(prob[image, step].cpu().numpy().astype(np.float32))
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


def _as_ingredient(choice: Choice) -> dict[str, Any]:
    """A metric as it counts for results: its id, which stands in the rows, and files by their content."""
    return {"id": choice.id, **with_digests(choice.model_dump(mode="json"))}


STAGE = Stage(
    name="metrics",
    version=3,
    run=run,
    reads=lambda study, variant: {
        "metrics": [_as_ingredient(choice) for choice in study.config.metrics],
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (
        ("manifest", ""),
        ("predict", ""),
        ("parts", ""),
        ("attribute", variant),
        *((("truth", ""),) if reads_truth(study.config) else ()),
        *((("fit", fit),) if (fit := fit_of(study.config, variant)) is not None else ()),
    ),
    variants=lambda study: tuple(choice.id for choice in study.config.methods) if study.config.metrics else (),
    summary="measures every explanation",
)
