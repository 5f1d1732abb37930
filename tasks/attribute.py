"""attribute: one method's explanation of every image of a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from storage.schema import rows_to_table
from tasks.concept_fit import fit_of, read_fitted
from tasks.config import Choice, options_of
from tasks.labels import images_with_parts, read_part_labels
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study, with_digests
from tasks.targets import predicted_pictures, read_targets
from tasks.worker import Pictures, study_classifier
from xai_core.attribution import PartScores, attribute_arrays, join_scores, paint_parts, score_parts
from xai_core.batching import Batches, try_batches
from xai_core.errors import ImageError, NotFinite, UsageError
from xai_core.parts import MOST_PARTS, part_areas
from xai_core.registry import MethodEntry, methods


@dataclass(frozen=True)
class Explained:
    """Maps ``[n, h, w]`` of some pictures, and part scores where the method scores parts.

    ``finite`` ``[n]`` says whose map, and all of whose parts' scores, are numbers; ``arrays`` are what the method
    hands out beside the map, ``[n, ...]`` each.
    """

    maps: Tensor
    scores: PartScores | None
    finite: Tensor
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


def run(context: Context) -> Outcome:
    """The arrays ``maps``, ``scale``, ``valid``, what the method hands out beside them, and part scores."""
    choice = _choice(context)
    _refuse_other_files(context, choice)
    entry = methods.get(choice.name)
    pictures = predicted_pictures(context)
    if entry.output == "parts":
        pictures = pictures.of_images(images_with_parts(context))
    batches = _explain(context, choice, entry, pictures)
    finite = torch.cat([one.finite for one in batches.results]).tolist() if batches.results else []
    failed: dict[int, ImageError] = {
        row: NotFinite("the map, or the score of a part, is NaN or infinite")
        for row, good in zip(batches.rows, finite, strict=True)
        if not good
    }
    failed.update(batches.failed)
    kept = pictures.take([row for row in batches.rows if row not in failed])
    if len(kept):
        _write(context, entry, batches.results, kept)
    return Outcome(pictures.given, len(kept), (*pictures.bad, *pictures.as_bad(failed)))


def _refuse_other_files(context: Context, choice: Choice) -> None:
    """Refuses a checkpoint that is not the one of the plan: its results would stand under the other's key."""
    planned, found = context.work.ingredients["config"]["options"], _as_ingredients(choice)["options"]
    if found != planned:
        raise UsageError(
            f"{choice.id}: expected the checkpoint that the study was planned with ({planned}), got another "
            f"({found}): the file changed while the study ran; run it again to take the new one"
        )


def _as_ingredients(choice: Choice) -> dict[str, Any]:
    """A method with its options as ingredients of a key: files stand there by what they hold."""
    return with_digests(choice.model_dump(mode="json"))


def _choice(context: Context) -> Choice:
    return next(choice for choice in context.config.methods if choice.id == context.work.unit.variant)


def _explain(context: Context, choice: Choice, entry: MethodEntry, pictures: Pictures) -> Batches[Explained]:
    config = context.config.run
    model = study_classifier(context)
    targets = read_targets(context, pictures)
    shared = {
        "method": choice.name,
        "options": options_of(methods, choice),
        "batch_size": config.batch_size,
        "precision": config.precision,
        "fitted": read_fitted(context),
    }
    labels = read_part_labels(context, pictures).to(context.device) if entry.output == "parts" else None

    def explain(rows: slice) -> Explained:
        inputs, of = pictures.inputs[rows], targets[rows]
        if labels is None:
            maps, arrays = attribute_arrays(model, inputs, of, native=True, **shared)
            on_cpu = {name: values.cpu() for name, values in arrays.items()}
            return Explained(maps, None, _all_finite(maps), on_cpu)
        scores = score_parts(model, inputs, of, labels[rows], **shared)
        maps = paint_parts(scores.score, labels[rows])
        return Explained(maps, scores, _all_finite(maps) & _scored(scores, labels[rows]))

    # A part method cuts all (image, part) pairs that it is given into passes of its own.
    together = config.batch_size if labels is None else max(1, len(pictures))
    return try_batches(explain, len(pictures), together)


def _all_finite(maps: Tensor) -> Tensor:
    """Which maps are numbers throughout, ``[n]``, in the precision in which they are stored."""
    return maps.float().isfinite().flatten(1).all(dim=1)


def _scored(scores: PartScores, labels: Tensor) -> Tensor:
    """Which pictures have a number for every part that they have, ``[n]``, in the score and in all its terms."""
    present = part_areas(labels, MOST_PARTS) > 0
    known = [
        F.pad(values, (0, MOST_PARTS - values.shape[1]), value=torch.nan).isfinite()
        for values in (scores.score, *scores.terms.values())
    ]
    return (torch.stack(known).all(dim=0) | ~present).all(dim=1)


def _write(context: Context, entry: MethodEntry, explained: list[Explained], kept: Pictures) -> None:
    """Writes what is finite of some batches; ``kept`` are the pictures that it belongs to."""
    finite = torch.cat([one.finite for one in explained])
    maps, scale = _to_storage(torch.cat([one.maps for one in explained])[finite], entry.upsampling is None)
    rule = entry.upsampling or ""
    context.write_array("maps", kept.rows, maps, ("y", "x"), upsampling=rule, unit="value / scale")
    context.write_array("scale", kept.rows, scale, ())
    for name, dimensions in entry.arrays(options_of(methods, _choice(context))).items():
        values = torch.cat([one.arrays[name] for one in explained])[finite.cpu()]
        context.write_array(name, kept.rows, values.numpy(), dimensions)
    context.write_valid(kept.rows)
    scores = [one.scores for one in explained if one.scores is not None]
    if scores:
        rows = _score_rows(context.work.unit.variant, kept.image_ids, join_scores(scores), finite)
        context.commit.table("part_scores", rows)


def _to_storage(maps: Tensor, full_resolution: bool) -> tuple[np.ndarray, np.ndarray]:
    """Full-resolution maps as float16 shares of their largest value, so that small ones do not vanish."""
    maps = maps.float().cpu()
    if not full_resolution:
        return maps.numpy(), np.ones(len(maps), np.float32)
    largest = maps.flatten(1).abs().amax(dim=1) if len(maps) else torch.zeros(0)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (maps / scale.view(-1, 1, 1)).half().numpy(), scale.numpy()


def _score_rows(  # type: ignore[no-untyped-def]
    method: str, image_ids: np.ndarray, scores: PartScores, finite: Tensor
):
    score = scores.score[finite]
    image, part = (~score.isnan()).nonzero(as_tuple=True)
    missing = torch.full_like(scores.score, torch.nan)
    terms = {name: scores.terms.get(name, missing)[finite] for name in ("kl_sym", "curvature")}
    columns = {name: _nullable(values[image, part]) for name, values in {"score": score, **terms}.items()}
    return rows_to_table(
        "part_scores",
        {
            "image_id": image_ids[image.cpu().numpy()],
            "method": [method] * len(image),
            "part_id": part.cpu().numpy(),
            **columns,
        },
    )


def _nullable(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.double().tolist()]


def upstream(study: Study, variant: str) -> tuple[tuple[str, str], ...]:
    """Images and targets, parts where the method scores parts, and what it learnt where it learns from data."""
    choice = next(choice for choice in study.config.methods if choice.id == variant)
    fit = fit_of(study.config, variant)
    always = (("manifest", ""), ("predict", ""), *((("fit", fit),) if fit is not None else ()))
    return (*always, ("parts", "")) if methods.get(choice.name).output == "parts" else always


STAGE = Stage(
    name="attribute",
    version=3,
    run=run,
    reads=lambda study, variant: {
        **next(_as_ingredients(choice) for choice in study.config.methods if choice.id == variant),
        "precision": study.config.run.precision,
    },
    upstream=upstream,
    variants=lambda study: tuple(choice.id for choice in study.config.methods),
    summary="explains every image with every method",
)
