"""The target class of every picture, as the predict stage fixed it."""

from __future__ import annotations

import torch

from tasks.stage import Context
from tasks.worker import Pictures


def read_targets(context: Context, pictures: Pictures) -> torch.Tensor:
    """Target class indices ``[n]`` in the pictures' order."""
    table = context.store.read_table(context.record("predict"), "targets")
    target_of = dict(zip(table["image_id"].to_pylist(), table["target"].to_pylist(), strict=True))
    return torch.tensor([target_of[image_id] for image_id in pictures.image_ids.tolist()], dtype=torch.int64)
