"""Reading committed part labels and maps back, for the pictures that have them."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.stage import Context
from tasks.worker import Pictures
from xai_core.attribution import upsample_map


def read_part_labels(context: Context, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Labels ``[n, H, W]`` uint8 of the pictures and which of them were cut into parts ``[n]``."""
    record = context.record("parts")
    rows = pictures.rows
    labels = torch.from_numpy(context.store.read_array(record, "labels"))[rows]
    return labels, torch.from_numpy(context.store.read_array(record, "valid"))[rows]


def read_maps(context: Context, method: str, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """A method's maps at input resolution ``[n, H, W]`` float32, and which pictures have one ``[n]``."""
    record = context.record("attribute", method)
    size = pictures.inputs.shape[-2:]
    if "maps" not in record.facts["arrays"]:
        return torch.zeros(len(pictures), *size), torch.zeros(len(pictures), dtype=torch.bool)
    maps = torch.from_numpy(context.store.read_array(record, "maps")).float()[pictures.rows]
    scale = torch.from_numpy(context.store.read_array(record, "scale"))[pictures.rows]
    valid = torch.from_numpy(context.store.read_array(record, "valid"))[pictures.rows]
    rule = context.store.array_attributes(record, "maps")["upsampling"] or None
    return upsample_map(maps * scale.view(-1, 1, 1), size, rule), valid
