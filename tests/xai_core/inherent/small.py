"""Small architectures with lively random weights, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import build_options
from xai_core.training import kinds, save_trained

SIDE, PATCH, CLASSES = 16, 4, 3
GRID = SIDE // PATCH
WIDTHS: dict[str, Any] = {"embed_dim": 6, "importance_width": 4, "component_width": 4}
IA: dict[str, Any] = {"num_classes": CLASSES, "img_size": SIDE, "patch_size": PATCH, **WIDTHS}
EA: dict[str, Any] = {**IA, "context_width": 4}
PA: dict[str, Any] = {
    "num_classes": CLASSES,
    "img_size": SIDE,
    "patch_size": PATCH,
    "importance_width": 4,
    "backbone": "resnet10t",
    "backbone_args": {"channels": [4, 4, 8, 8], "stem_width": 4},
}


def built(kind: str, seed: int = 0, lively: bool = True, **arguments: Any) -> Classifier:
    """A random ``ia``, ``ea`` or ``pa``."""
    create = {**{"ia": IA, "ea": EA, "pa": PA}[kind], **arguments}
    model = load_classifier(ModelSpec(f"vitrine_{kind}", False, create_args=create, seed=seed))
    return enliven(model) if lively else model


def enliven(model: Classifier) -> Classifier:
    """Batch norms that do something, branches that are not zero, importance that differs from patch to patch."""
    generator = torch.Generator().manual_seed(5)
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                assert values is not None
                values.uniform_(low, high, generator=generator)
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=1.0, generator=generator)
    return model


def images(count: int = 3, side: int = SIDE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random normalised pictures."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def bytes_of(count: int = 7, side: int = SIDE) -> Tensor:
    """Random pictures as bytes."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def labels_of(count: int = 7) -> Tensor:
    """A label for each."""
    return torch.arange(count) % CLASSES


def saved(model: Classifier, path: Path, kind: str = "ia", **options: Any) -> Path:
    """A file as ``vitrine train importance`` writes it."""
    entry = kinds.get(kind)
    chosen = build_options(entry, options)
    save_trained(
        path, model.module, {"kind": kind, "config": entry.config(model, chosen), "weights": None, "model": {}}
    )
    return path
