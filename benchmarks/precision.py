"""How far KL-Hessian's ranking of parts in each precision is from float64: Spearman, mean over images.

On the CPU with real weights and photographs where the shared data is present; else, and on a bare GPU
machine, with random ones, whose parts differ less than a trained model's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.kl_hessian import inputs
from benchmarks.timing import row
from xai_core.attribution import score_parts
from xai_core.models import ModelSpec, load_classifier
from xai_core.precision import Precision

MODEL = {"cpu": "deit_tiny_patch16_224", "cuda": "vit_base_patch16_224"}
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
IMAGES = 4
SHARED = Path(__file__).parents[2] / "shared" / "data"
CHECKPOINT = SHARED / "models" / "deit_tiny_patch16_224.safetensors"
PHOTOGRAPHS = sorted(SHARED.glob("imagenet-sample/images/*/*.jpg"))


def run(device: str) -> None:
    """Prints one row a precision."""
    name = MODEL[device]
    real = device == "cpu" and CHECKPOINT.exists()
    spec = ModelSpec(name, pretrained=False, checkpoint=str(CHECKPOINT) if real else None)
    model = load_classifier(spec, device)
    pictures, targets, parts = inputs(IMAGES, model, device)
    if real:
        pictures = torch.stack([model.preprocess(Image.open(path)) for path in PHOTOGRAPHS[:IMAGES]])
        targets = model(pictures).argmax(dim=1)
    found = {}
    for precision in PRECISIONS[device]:
        found[precision] = score_parts(model, pictures, targets, parts, precision=precision).score
    model.module.double()
    exact = score_parts(model, pictures.double(), targets, parts).score
    for precision, scores in found.items():
        correlation = spearman(scores, exact)
        row(
            f"{name} {'real' if real else 'random'} weights, {precision}",
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
