"""parts: every image cut into parts, by the parser that the config names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.errors import SourceError
from storage.schema import rows_to_table
from storage.sources.folder import path_of
from tasks.config import options_of
from tasks.stage import Bad, Context, Outcome, Stage
from tasks.worker import Pictures, classifier, load_pictures, study_classifier
from xai_core.parts import parse_parts, part_areas, part_boxes
from xai_core.precision import precision_context
from xai_core.registry import parsers


def run(context: Context) -> Outcome:
    """The array ``labels`` (uint8, 255 = no part) and rows of ``parts`` for one shard."""
    pictures = load_pictures(context)
    config = context.config
    masks, kept, bad = _masks(context, pictures)
    labels = _parse(context, pictures.inputs[kept], masks)
    rows = pictures.rows[kept]
    context.write_array("labels", rows, labels.cpu().numpy().astype(np.uint8), ("y", "x"), no_part=255)
    context.write_valid(rows)
    context.commit.table("parts", _part_rows(pictures.image_ids[kept], labels, config.parts.k))
    return Outcome(len(pictures) + len(pictures.bad), len(kept), (*pictures.bad, *bad))


def _parse(context: Context, inputs: Tensor, masks: Tensor | None) -> Tensor:
    config = context.config
    backbone = config.parts.backbone
    parser = config.parts.parser
    if not len(inputs):
        return torch.zeros(inputs.shape[:1] + inputs.shape[-2:], dtype=torch.uint8)
    with precision_context(config.run.precision, context.device):
        batches = [
            parse_parts(
                study_classifier(context),
                some,
                parser=parser.name,
                options=options_of(parsers, parser),
                k=config.parts.k,
                min_area=config.parts.min_area,
                masks=None if masks is None else masks[first : first + len(some)],
                seed=config.run.seed,
                backbone=None if backbone is None else classifier(backbone.model_dump_json(), context.device),
            )
            for first, some in _numbered(inputs, config.run.batch_size)
        ]
    return torch.cat(batches)


def _numbered(inputs: Tensor, size: int) -> list[tuple[int, Tensor]]:
    return [(first, inputs[first : first + size]) for first in range(0, len(inputs), size)]


def _masks(context: Context, pictures: Pictures) -> tuple[Tensor | None, list[int], list[Bad]]:
    """Mask files through the images' own geometry, the pictures that have one, and those whose mask is bad."""
    if "masks" not in parsers.get(context.config.parts.parser.name).needs:
        return None, list(range(len(pictures))), []
    folder = Path(str(context.config.dataset.masks))
    sizes = _sizes(context)
    model = study_classifier(context)
    masks, kept, bad = [], [], []
    for index, (image_id, path) in enumerate(zip(pictures.image_ids.tolist(), pictures.paths, strict=True)):
        try:
            masks.append(model.preprocess_mask(read_mask(folder, path, sizes[image_id])))
            kept.append(index)
        except (OSError, SourceError) as error:
            bad.append(Bad(image_id, path, type(error).__name__, str(error)))
    empty = torch.zeros(0, *model.input_size, dtype=torch.int64)
    return torch.stack(masks) if masks else empty, kept, bad


def _sizes(context: Context) -> dict[int, tuple[int, int]]:
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
    from PIL import Image

    path = mask_path(folder, image)
    try:
        mask = Image.open(path)
        mask.load()
    except Exception as error:
        # As for pictures: broken bytes make Pillow raise anything.
        raise SourceError(f"dataset.masks: expected a readable mask at {path}: {error}") from error
    if mask.size != size:
        raise SourceError(
            f"dataset.masks: expected {path.name} of size {size[0]} x {size[1]} like its image, "
            f"got {mask.size[0]} x {mask.size[1]}"
        )
    return mask if mask.mode in ("L", "P") else mask.convert("L")


def _part_rows(image_ids: np.ndarray, labels: Tensor, k: int):  # type: ignore[no-untyped-def]
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
    version=1,
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
