"""How far KL-Hessian's ranking of parts in each precision is from float64: Spearman, mean over images."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kl_hessian import inputs
from benchmarks.timing import row
from xai_core.attribution import score_parts
from xai_core.models import ModelSpec, load_classifier
from xai_core.precision import precision_context

MODEL = {"cpu": "deit_tiny_patch16_224", "cuda": "vit_base_patch16_224"}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
IMAGES = 4


def run(device: str) -> None:
    """Prints one row a precision."""
    name = MODEL[device]
    model = load_classifier(ModelSpec(name, pretrained=False), device)
    pictures, targets, parts = inputs(IMAGES, model, device)
    found = {}
    for precision in PRECISIONS[device]:
        with precision_context(precision, device):  # type: ignore[arg-type]
            found[precision] = score_parts(model, pictures, targets, parts).score
    model.module.double()
    exact = score_parts(model, pictures.double(), targets, parts).score
    for precision, scores in found.items():
        correlation = spearman(scores, exact)
        row(
            f"{name} {precision} against float64",
            mean=float(correlation.mean()),
            least=float(correlation.min()),
            images=str(IMAGES),
        )


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """Rank correlation along the last axis: ``[B]``."""
    ranks = [values.argsort(1).argsort(1).double() for values in (left, right)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    products = (centred[0] * centred[1]).sum(1)
    return products / torch.linalg.vector_norm(centred[0], dim=1) / torch.linalg.vector_norm(centred[1], dim=1)
