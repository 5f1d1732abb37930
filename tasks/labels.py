"""Reading committed part labels and maps back, for the pictures that have them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage.commits import CommitRecord
from tasks.stage import Context
from tasks.worker import Pictures
from xai_core.attribution import upsample_map


def images_with_parts(context: Context) -> set[int]:
    """Ids of the shard's images that were cut into parts."""
    return _valid_images(context, context.record("parts"))


def images_with_map(context: Context, method: str) -> set[int]:
    """Ids of the shard's images that a method explained."""
    return _valid_images(context, context.record("attribute", method))


def read_part_labels(context: Context, pictures: Pictures) -> Tensor:
    """Labels ``[n, H, W]`` uint8 of pictures that have them."""
    return torch.from_numpy(context.store.read_array(context.record("parts"), "labels")[pictures.rows])


def read_maps(context: Context, method: str, pictures: Pictures) -> Tensor:
    """A method's maps at input resolution ``[n, H, W]`` float32, of pictures that have one."""
    record = context.record("attribute", method)
    maps, scale = (
        torch.from_numpy(context.store.read_array(record, name)[pictures.rows]).float()
        for name in ("maps", "scale")
    )
    rule = context.store.array_attributes(record, "maps")["upsampling"] or None
    return upsample_map(maps * scale.view(-1, 1, 1), pictures.inputs.shape[-2:], rule)


def _valid_images(context: Context, record: CommitRecord) -> set[int]:
    """A stage that had no image at all wrote no arrays."""
    if "valid" not in record.facts["arrays"]:
        return set()
    valid = context.store.read_array(record, "valid")
    return {context.work.start + int(row) for row in np.flatnonzero(valid)}
