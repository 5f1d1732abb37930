"""attribute: one method's explanation of every image of a shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.schema import rows_to_table
from tasks.config import Choice, options_of
from tasks.labels import read_part_labels
from tasks.stage import Bad, Context, Outcome, Stage
from tasks.study import Study
from tasks.targets import read_targets
from tasks.worker import Pictures, load_pictures, study_classifier
from xai_core.attribution import PartScores, attribute, paint_parts, score_parts
from xai_core.precision import precision_context
from xai_core.registry import MethodEntry, methods


@dataclass(frozen=True)
class Explained:
    """Maps ``[n, h, w]`` of some pictures, and part scores where the method scores parts."""

    maps: Tensor
    scores: PartScores | None


def run(context: Context) -> Outcome:
    """The arrays ``maps``, ``scale``, ``valid`` and, for part methods, rows of ``part_scores`` for one shard."""
    choice = _choice(context)
    entry = methods.get(choice.name)
    pictures = load_pictures(context)
    labels, has_parts = read_part_labels(context, pictures) if entry.output == "parts" else (None, None)
    chosen = torch.arange(len(pictures)) if has_parts is None else has_parts.nonzero().squeeze(1)
    given = len(chosen) + len(pictures.bad)
    if not len(chosen):
        return Outcome(given, 0, pictures.bad)
    explained = _explain(context, choice, entry, pictures, labels, chosen)
    finite = torch.isfinite(explained.maps.flatten(1)).all(dim=1).cpu()
    _write(context, entry, explained, pictures, chosen, finite)
    bad = tuple(
        Bad(int(pictures.image_ids[i]), pictures.paths[i], "NotFinite", f"{choice.id} gave NaN or infinity")
        for i in chosen[~finite].tolist()
    )
    return Outcome(given, int(finite.sum()), (*pictures.bad, *bad))


def _choice(context: Context) -> Choice:
    return next(choice for choice in context.config.methods if choice.id == context.work.unit.variant)


def _explain(
    context: Context,
    choice: Choice,
    entry: MethodEntry,
    pictures: Pictures,
    labels: Tensor | None,
    chosen: Tensor,
) -> Explained:
    config = context.config.run
    model = study_classifier(context)
    inputs = pictures.inputs[chosen]
    targets = read_targets(context, pictures)[chosen].to(context.device)
    options = options_of(methods, choice)
    with precision_context(config.precision, context.device):
        if labels is None:
            maps = attribute(
                model,
                inputs,
                targets,
                method=choice.name,
                options=options,
                batch_size=config.batch_size,
                native=True,
            )
            return Explained(maps, None)
        parts = labels[chosen].to(context.device)
        scores = score_parts(
            model, inputs, targets, parts, method=choice.name, options=options, batch_size=config.batch_size
        )
        return Explained(paint_parts(scores.score, parts), scores)


def _write(
    context: Context,
    entry: MethodEntry,
    explained: Explained,
    pictures: Pictures,
    chosen: Tensor,
    finite: Tensor,
) -> None:
    rows = pictures.rows[chosen.numpy()][finite.numpy()]
    maps, scale = _to_storage(explained.maps[finite.to(explained.maps.device)], entry.upsampling is None)
    rule = entry.upsampling or ""
    context.write_array("maps", rows, maps, ("y", "x"), upsampling=rule, unit="value / scale")
    context.write_array("scale", rows, scale, ())
    context.write_valid(rows)
    if explained.scores is not None:
        ids = pictures.image_ids[chosen.numpy()]
        context.commit.table("part_scores", _score_rows(context.work.unit.variant, ids, explained.scores))


def _to_storage(maps: Tensor, full_resolution: bool) -> tuple[np.ndarray, np.ndarray]:
    """Full-resolution maps as float16 shares of their largest value, so that small ones do not vanish."""
    maps = maps.float().cpu()
    if not full_resolution:
        return maps.numpy(), np.ones(len(maps), np.float32)
    largest = maps.flatten(1).abs().amax(dim=1) if len(maps) else torch.zeros(0)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (maps / scale.view(-1, 1, 1)).half().numpy(), scale.numpy()


def _score_rows(method: str, image_ids: np.ndarray, scores: PartScores):  # type: ignore[no-untyped-def]
    image, part = (~scores.score.isnan()).nonzero(as_tuple=True)
    missing = torch.full_like(scores.score, torch.nan)
    terms = {name: scores.terms.get(name, missing) for name in ("kl_sym", "curvature")}
    columns = {name: _nullable(values[image, part]) for name, values in {"score": scores.score, **terms}.items()}
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
    """Images and targets, and parts where the method scores parts."""
    choice = next(choice for choice in study.config.methods if choice.id == variant)
    always = (("manifest", ""), ("predict", ""))
    return (*always, ("parts", "")) if methods.get(choice.name).output == "parts" else always


STAGE = Stage(
    name="attribute",
    version=1,
    run=run,
    reads=lambda study, variant: {
        **next(choice.model_dump(mode="json") for choice in study.config.methods if choice.id == variant),
        "precision": study.config.run.precision,
    },
    upstream=upstream,
    variants=lambda study: tuple(choice.id for choice in study.config.methods),
    summary="explains every image with every method",
)
