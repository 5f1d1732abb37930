"""truth: what is known of every image beside its pixels, for the metrics that compare maps with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storage.commits import Unit
from storage.schema import rows_to_table
from tasks.config import StudyConfig, options_of
from tasks.parts import picture_sizes
from tasks.predict import class_names
from tasks.quarantine import IMAGE_ERRORS
from tasks.stage import Context, Outcome, Stage
from tasks.targets import predicted_pictures, read_targets
from tasks.truth_files import Teller, teller
from tasks.truth_scenes import Drawn, drawn
from tasks.worker import Pictures, study_classifier
from xai_core.metrics.truth import INSIDE, OUTSIDE, UNKNOWN, Truth
from xai_core.models import Classifier
from xai_core.parts import part_areas
from xai_core.parts.labels import NO_PART
from xai_core.registry import Need, metrics

NO_TRUTH = "no truth is known of the image"
# Errors of pictures by position.
Failed = dict[int, Exception]
NEEDS: tuple[Need, ...] = ("mask", "effects")


def known_needs(config: StudyConfig) -> frozenset[Need]:
    """Which of :data:`NEEDS` a study's data can meet."""
    if config.dataset.kind == "demo":
        return frozenset(NEEDS)
    return frozenset(("mask",) if config.truth.masks or config.truth.boxes else ())


def reads_truth(config: StudyConfig) -> bool:
    """Whether a metric of the study needs what this stage finds out, and it can."""
    needed = {
        need
        for choice in config.metrics
        for need in metrics.get(choice.name).all_needs(options_of(metrics, choice))
    }
    return bool(needed & known_needs(config))


def run(context: Context) -> Outcome:
    """The array ``mask`` and rows of ``true_masks``; for the demo also the array ``parts`` and ``true_parts``."""
    pictures = predicted_pictures(context)
    write = _write_drawn if context.config.dataset.kind == "demo" else _write_told
    kept, failed = write(context, pictures)
    context.write_valid(kept.rows)
    return Outcome(pictures.given, len(kept), (*pictures.bad, *pictures.as_bad(failed)))


def _write_told(context: Context, pictures: Pictures) -> tuple[Pictures, Failed]:
    """What files tell of the pictures; those kept, and the errors of the others."""
    model = study_classifier(context)
    tell = teller(context.config.truth, class_names(context, model), context.work.ingredients["config"]["files"])
    masks, reasons, failed = told_masks(context, model, tell, pictures, read_targets(context, pictures).tolist())
    kept = pictures.take([at for at in range(len(pictures)) if at not in failed])
    _write_masks(context, kept, masks, reasons)
    return kept, failed


def told_masks(
    context: Context, model: Classifier, tell: Teller, pictures: Pictures, classes: Sequence[int]
) -> tuple[Tensor, list[str | None], Failed]:
    """What files tell of the objects of some classes, one a picture, through a model's geometry.

    Returns:
        integer masks ``[k, H, W]`` of the pictures that did not fail, for each why it says nothing (None where it
        says something), and the errors of the others.
    """
    sizes = picture_sizes(context)
    masks, reasons = [], []
    failed: Failed = {}
    for at, (image_id, path) in enumerate(zip(pictures.image_ids.tolist(), pictures.paths, strict=True)):
        try:
            told = tell(path, sizes[image_id], classes[at])
            masks.append(model.preprocess_mask(Image.fromarray(told.mask)))
            reasons.append(told.reason)
        except IMAGE_ERRORS as error:
            failed[at] = error
    return torch.stack(masks) if masks else torch.zeros(0, *model.input_size), reasons, failed


def _write_drawn(context: Context, pictures: Pictures) -> tuple[Pictures, Failed]:
    """What the demo drew; the pictures kept, and the errors of the others."""
    scenes = drawn(context, pictures)
    positions = [at for at in range(len(pictures)) if at not in scenes.failed]
    kept, labels = pictures.take(positions), scenes.labels[positions]
    _write_masks(context, kept, torch.where(labels == NO_PART, OUTSIDE, INSIDE), [None] * len(kept))
    context.write_array("parts", kept.rows, labels.numpy(), ("y", "x"), no_part=NO_PART)
    context.commit.table("true_parts", _part_rows(kept, positions, scenes, labels))
    return kept, dict(scenes.failed)


def _write_masks(context: Context, kept: Pictures, masks: Tensor, reasons: Sequence[str | None]) -> None:
    values = masks.to(torch.uint8).numpy()
    context.write_array("mask", kept.rows, values, ("y", "x"), inside=INSIDE, outside=OUTSIDE, unknown=UNKNOWN)
    counted = {"inside": INSIDE, "outside": OUTSIDE, "unknown": UNKNOWN}
    columns = {name: (values == value).sum(axis=(1, 2)) for name, value in counted.items()}
    rows = {"image_id": kept.image_ids, **columns, "reason": list(reasons)}
    context.commit.table("true_masks", rows_to_table("true_masks", rows))


def _part_rows(kept: Pictures, positions: Sequence[int], scenes: Drawn, labels: Tensor):  # type: ignore[no-untyped-def]
    parts = [scenes.scenes[at].parts for at in positions]
    areas = part_areas(labels, max(map(len, parts), default=0)).tolist()
    return rows_to_table(
        "true_parts",
        {
            "image_id": np.repeat(kept.image_ids, [len(some) for some in parts]),
            "part_id": [number for some in parts for number in range(len(some))],
            "name": [part.name for some in parts for part in some],
            "deciding": [part.deciding for some in parts for part in some],
            "area": [area for some, counts in zip(parts, areas, strict=True) for area in counts[: len(some)]],
            "effect": [effect for at in positions for effect in scenes.effects[at].tolist()],
        },
    )


def read_truth(context: Context, pictures: Pictures) -> tuple[Truth, tuple[str | None, ...]]:
    """What is known of some pictures, and for each why its mask says nothing, None where it says something."""
    unit = Unit(STAGE.name, "", context.work.unit.shard)
    if unit not in context.work.upstream:
        return Truth(), (None,) * len(pictures)
    record = context.record(STAGE.name)
    rows, ids = pictures.rows, pictures.image_ids.tolist()
    valid = context.store.read_array(record, "valid")[rows]
    reason_of = _column(context, "true_masks", "reason")
    reasons = tuple(reason_of.get(one, NO_TRUTH) for one in ids)

    def read(name: str, without: int) -> Tensor:
        values = context.store.read_array(record, name)[rows]
        return torch.from_numpy(np.where(valid[:, None, None], values, np.uint8(without)))

    if context.config.dataset.kind != "demo":
        return Truth(read("mask", UNKNOWN)), reasons
    return Truth(read("mask", UNKNOWN), read("parts", NO_PART), _effects(context, ids)), reasons


def _column(context: Context, table: str, name: str):  # type: ignore[no-untyped-def]
    rows = context.store.read_table(context.record(STAGE.name), table)
    return dict(zip(rows["image_id"].to_pylist(), rows[name].to_pylist(), strict=True))


def _effects(context: Context, image_ids: list[int]) -> Tensor:
    """Effects of the images' true parts, ``[n, P]`` (NaN: no such part)."""
    rows = context.store.read_table(context.record(STAGE.name), "true_parts")
    position = {image_id: at for at, image_id in enumerate(image_ids)}
    width = 1 + max(rows["part_id"].to_pylist(), default=-1)
    effects = torch.full((len(image_ids), width), torch.nan, dtype=torch.float64)
    for image_id, part_id, effect in zip(
        *(rows[one].to_pylist() for one in ("image_id", "part_id", "effect")), strict=True
    ):
        if image_id in position:
            effects[position[image_id], part_id] = effect
    return effects


STAGE = Stage(
    name="truth",
    version=1,
    run=run,
    reads=lambda study, variant: {
        "kind": study.config.dataset.kind,
        **study.config.truth.model_dump(mode="json", exclude={"masks", "boxes"}),
        "files": study.truth_files,
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (("manifest", ""), ("predict", "")),
    variants=lambda study: ("",) if reads_truth(study.config) else (),
    summary="what is known of every image's object",
)
