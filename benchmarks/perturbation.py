"""Occlusion, RISE and Kernel SHAP on patches against a plain loop of forwards over as many pictures, batch 32.

The ratio is the plain loop's time over the method's, round by round in one run: 1 means that making masks, masking
and adding up cost nothing. The plain loop forwards one ready batch again and again and keeps its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate, median, row
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec, load_classifier

MODELS = ("resnet18", "deit_tiny_patch16_224")
# Pictures an image: 256 masks; 16 x 16 windows and the clean image; 256 coalitions of 49 cells.
METHODS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("rise", {"masks": 256}, 256),
    ("occlusion", {"window": 44, "stride": 12}, 257),
    ("kernel_shap_patches", {"samples": 256}, 256),
)
BATCH_SIZE = 32
IMAGES = {"cpu": (1,), "cuda": (2, 32)}
REPEATS = {"cpu": 3, "cuda": 5}


def run(device: str) -> None:
    """Prints one row a model, method and number of images."""
    for name in MODELS:
        model = load_classifier(ModelSpec(name, pretrained=False), device)
        for images in IMAGES[device]:
            for method, options, pictures in METHODS:
                compare(model, method, options, pictures * images, images, device)


def compare(
    model: Classifier, method: str, options: dict[str, Any], pictures: int, images: int, device: str
) -> None:
    """One row: pictures a second of both, and their ratio."""
    batch = torch.randn(BATCH_SIZE, 3, *model.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.zeros(images, dtype=torch.long, device=device)
    functions: dict[str, Callable[[], object]] = {
        "plain": partial(plain_loop, model, batch, pictures),
        "ours": partial(
            attribute, model, batch[:images], targets, method=method, options=options, batch_size=BATCH_SIZE
        ),
    }
    times = alternate(functions, REPEATS[device], device)
    ratios = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)]
    row(
        f"{model.spec.name} {method}, {images} images",
        pictures=str(pictures),
        plain_per_s=pictures / median(times["plain"]),
        ours_per_s=pictures / median(times["ours"]),
        ratio=median(ratios),
    )


def plain_loop(model: Classifier, batch: Tensor, pictures: int) -> Tensor:
    """So many pictures forwarded in full batches and a rest, nothing else."""
    with torch.no_grad():
        return torch.cat(
            [model(batch[: min(BATCH_SIZE, pictures - first)]) for first in range(0, pictures, BATCH_SIZE)]
        )
