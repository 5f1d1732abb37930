"""The pictures that have a target class, and that class as the predict stage fixed it."""

from __future__ import annotations

import torch

from tasks.stage import Context
from tasks.worker import Pictures, load_pictures


def predicted_pictures(context: Context) -> Pictures:
    """The shard's pictures without those that the predict stage set aside: these have no target."""
    return load_pictures(context).of_images(_targets(context))


def read_targets(context: Context, pictures: Pictures) -> torch.Tensor:
    """Target class indices ``[n]`` in the pictures' order, on the context's device."""
    targets = _targets(context)
    chosen = [targets[image_id] for image_id in pictures.image_ids.tolist()]
    return torch.tensor(chosen, dtype=torch.int64, device=context.device)


def _targets(context: Context) -> dict[int, int]:
    table = context.store.read_table(context.record("predict"), "targets")
    return dict(zip(table["image_id"].to_pylist(), table["target"].to_pylist(), strict=True))
