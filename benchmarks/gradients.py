"""Gradient methods against Captum, the peer that has them, on the same pictures at the same batch size.

Captum's integrated gradients holds (image, step) pairs of ``internal_batch_size`` in a pass, ours of
``batch_size``. Both are timed in turn in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import alternate, median, row
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec, load_classifier

STEPS = 10
REPEATS = 3


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    networks = ("resnet50", "vit_base_patch16_224") if device == "cuda" else ("resnet18", "deit_tiny_patch16_224")
    for name in networks:
        compare(name, device, images=64 if device == "cuda" else 4, batch_size=64 if device == "cuda" else 16)


def compare(name: str, device: str, *, images: int, batch_size: int) -> None:
    """Rows of one network: our images a second over Captum's, method by method."""
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    model = load_classifier(ModelSpec(name, pretrained=False), device)
    torch.manual_seed(0)
    pictures = torch.randn(images, 3, *model.input_size, device=device)
    targets = torch.zeros(images, dtype=torch.long, device=device)
    black = model.normalise(torch.zeros_like(pictures))
    peers: dict[str, tuple[dict[str, object], Callable[[], object]]] = {
        "gradient": ({}, partial(Saliency(model.module).attribute, pictures.clone(), targets)),
        "input_x_gradient": ({}, partial(InputXGradient(model.module).attribute, pictures.clone(), targets)),
        "integrated_gradients": (
            {"steps": STEPS},
            partial(
                IntegratedGradients(model.module).attribute,
                pictures,
                black,
                targets,
                n_steps=STEPS,
                internal_batch_size=batch_size,
            ),
        ),
    }
    for method, (options, peer) in peers.items():
        ours = partial(_ours, model, pictures, targets, method, options, batch_size)
        times = alternate({"ours": ours, "captum": peer}, REPEATS, device)
        ratios = [theirs / mine for mine, theirs in zip(times["ours"], times["captum"], strict=True)]
        row(
            f"{name} {method} batch={batch_size}",
            **{"images/s": images / median(times["ours"]), "over captum's": median(ratios)},
        )


def _ours(
    model: Classifier, pictures: Tensor, targets: Tensor, method: str, options: dict[str, object], batch_size: int
) -> Tensor:
    return attribute(model, pictures, targets, method=method, options=options, batch_size=batch_size)
