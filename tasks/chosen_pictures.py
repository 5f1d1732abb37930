"""Pictures of chosen images of a study, whatever their shard, for stages that are not sharded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.quarantine import IMAGE_ERRORS
from tasks.sources import open_source, read_listed
from tasks.stage import Context
from tasks.worker import study_classifier

Row = dict[str, Any]


def listed_rows(context: Context, image_ids: Collection[int]) -> list[Row]:
    """The manifest's rows of some images, in their order; the stage must read the manifest."""
    size = context.config.run.shard_size
    shards = {image_id // size for image_id in image_ids}
    wanted = set(image_ids)
    return [
        row
        for unit in sorted(context.work.upstream, key=lambda unit: unit.shard)
        if unit.stage == "manifest" and unit.shard in shards
        for row in context.store.read_table(context.record("manifest", "", unit.shard), "manifest").to_pylist()
        if row["image_id"] in wanted
    ]


def read_inputs(context: Context, rows: Sequence[Row]) -> tuple[Tensor, list[Row]]:
    """Model inputs ``[n, 3, H, W]`` of the pictures that can still be read as they were listed, and their rows."""
    model = study_classifier(context)
    read = [(model.preprocess(picture), row) for picture, row in _pictures(context, rows)]
    empty = torch.zeros(0, 3, *model.input_size)
    return (torch.stack([image for image, _ in read]) if read else empty), [row for _, row in read]


def _pictures(context: Context, rows: Sequence[Row]) -> Iterator[tuple[Any, Row]]:
    source = open_source(context.config.dataset)
    for row in rows:
        try:
            yield read_listed(source, row["path"], row["sha256"]), row
        except IMAGE_ERRORS:
            # What changed since is set aside by the stages that treat every image.
            continue
