"""parts: every image cut into parts, by the parser that the config names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.errors import SourceError
from storage.schema import rows_to_table
from storage.sources.decode import open_picture
from storage.sources.folder import open_file, path_of
from tasks.config import options_of
from tasks.quarantine import IMAGE_ERRORS, set_aside
from tasks.stage import Bad, Context, Outcome, Stage
from tasks.worker import Pictures, classifier, load_pictures, study_classifier
from xai_core.batching import Batches, try_batches
from xai_core.parts import parse_parts, part_areas, part_boxes
from xai_core.precision import precision_context
from xai_core.registry import parsers


def run(context: Context) -> Outcome:
    """The array ``labels`` (uint8, 255 = no part) and rows of ``parts`` for one shard."""
    everything = load_pictures(context)
    masks, kept, bad = _masks(context, everything)
    masked = everything.take(kept)
    batches = _parse(context, masked.inputs, masks)
    pictures = masked.take(batches.rows)
    empty = torch.zeros(0, *pictures.inputs.shape[-2:], dtype=torch.uint8)
    labels = torch.cat(batches.results) if batches.results else empty
    context.write_array("labels", pictures.rows, labels.cpu().numpy().astype(np.uint8), ("y", "x"), no_part=255)
    context.write_valid(pictures.rows)
    context.commit.table("parts", _part_rows(pictures.image_ids, labels))
    bad = [*everything.bad, *bad, *masked.as_bad(batches.failed)]
    return Outcome(everything.given, len(pictures), tuple(bad))


def _parse(context: Context, inputs: Tensor, masks: Tensor | None) -> Batches[Tensor]:
    """Labels of the inputs ``[n, 3, H, W]``, batch by batch."""
    config = context.config
    backbone = config.parts.backbone
    parser = config.parts.parser

    def parse(rows: slice) -> Tensor:
        return parse_parts(
            study_classifier(context),
            inputs[rows],
            parser=parser.name,
            options=options_of(parsers, parser),
            k=config.parts.k,
            min_area=config.parts.min_area,
            masks=None if masks is None else masks[rows],
            seed=config.run.seed,
            backbone=None if backbone is None else classifier(backbone.model_dump_json(), context.device),
        )

    with precision_context(config.run.precision, context.device):
        return try_batches(parse, len(inputs), config.run.batch_size)


def _masks(context: Context, pictures: Pictures) -> tuple[Tensor | None, list[int], list[Bad]]:
    """Mask files through the images' own geometry, the pictures that have one, and those whose mask is bad."""
    if "masks" not in parsers.get(context.config.parts.parser.name).needs:
        return None, list(range(len(pictures))), []
    folder = Path(str(context.config.dataset.masks))
    sizes = picture_sizes(context)
    model = study_classifier(context)
    masks, kept, bad = [], [], []
    for index, (image_id, path) in enumerate(zip(pictures.image_ids.tolist(), pictures.paths, strict=True)):
        try:
            masks.append(model.preprocess_mask(read_mask(folder, path, sizes[image_id])))
            kept.append(index)
        except IMAGE_ERRORS as error:
            bad.append(set_aside(image_id, path, error))
    empty = torch.zeros(0, *model.input_size, dtype=torch.int64)
    return torch.stack(masks) if masks else empty, kept, bad


def picture_sizes(context: Context) -> dict[int, tuple[int, int]]:
    """Width and height of the shard's upright pictures by image id."""
    manifest = context.store.read_table(context.record("manifest"), "manifest").to_pylist()
    return {row["image_id"]: (row["width"], row["height"]) for row in manifest}


def mask_path(folder: Path, image: str) -> Path:
    """Where the mask of an image stands: the same relative path, as PNG."""
    return (folder / path_of(image)).with_suffix(".png")


def read_mask(folder: Path, image: str, size: tuple[int, int]):  # type: ignore[no-untyped-def]
    """The mask of an image as a PIL picture of integers.

    Raises:
        SourceError: it cannot be read, or its size differs from the image's.
    """
    path = mask_path(folder, image)
    try:
        with open_file(path) as stream:
            mask = open_picture(stream.read())
    except (OSError, SourceError) as error:
        raise SourceError(f"dataset.masks: expected a readable mask at {path}: {error}") from error
    if mask.size != size:
        raise SourceError(
            f"dataset.masks: expected {path.name} of size {size[0]} x {size[1]} like its image, "
            f"got {mask.size[0]} x {mask.size[1]}"
        )
    return mask if mask.mode in ("L", "P") else mask.convert("L")


def _part_rows(image_ids: np.ndarray, labels: Tensor):  # type: ignore[no-untyped-def]
    count = max((int(one[one != 255].max()) + 1 for one in labels if (one != 255).any()), default=0)
    areas = part_areas(labels, count)
    boxes = part_boxes(labels, count)
    image, part = (areas > 0).nonzero(as_tuple=True)
    chosen = boxes[image, part].cpu().numpy().reshape(-1, 4)
    return rows_to_table(
        "parts",
        {
            "image_id": image_ids[image.cpu().numpy()],
            "part_id": part.cpu().numpy(),
            "area": areas[image, part].cpu().numpy(),
            **{name: chosen[:, column] for column, name in enumerate(("x0", "y0", "x1", "y1"))},
        },
    )


STAGE = Stage(
    name="parts",
    version=2,
    run=run,
    reads=lambda study, variant: {
        **study.config.parts.model_dump(mode="json", exclude={"backbone"}),
        "backbone": study.backbone,
        "masks": study.masks,
        "seed": study.config.run.seed,
        "precision": study.config.run.precision,
    },
    upstream=lambda study, variant: (("manifest", ""),),
    summary="cuts images into parts",
)
