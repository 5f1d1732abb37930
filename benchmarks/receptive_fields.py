"""Receptive fields of vectors inside a network, in plain gradients through the same layers at the same batch.

A plain gradient is one forward up to the layer and one backward from it to the pixels, of one picture. ``one``: a
vector a picture; ``many``: several, whose forwards are shared. Networks have random weights. On the CPU times are
the process's own CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import median, row, timed
from xai_core.concepts.vectors import to_vectors
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.precision import own_modes
from xai_core.receptive_fields import attributors, feature_vectors, output_of, receptive_fields
from xai_core.receptive_fields.scalars import FeatureVectors
from xai_core.registry import build_options, variant_id

BATCH = 4
MANY = 8
REPEATS = 3
NETWORKS = {
    "resnet50": "layer4",
    "vgg16": "features",
    "mobilenetv2_100": "bn2",
    "deit_tiny_patch16_224": "blocks.11",
}
# The attributors of each kind of network, with what is off their defaults.
CASES: dict[str, tuple[tuple[str, dict[str, float]], ...]] = {
    "cnn": (("gradient", {}), ("srd", {})),
    "vit": (("gradient", {}), ("attn_lrp", {}), ("attn_lrp", {"gamma_linear": 0.0})),
}


def run(device: str) -> None:
    """Prints the rows of this benchmark."""
    for name, layer in NETWORKS.items():
        model = load_classifier(ModelSpec(name, pretrained=False), device)
        for attributor, options in CASES[model.family]:
            compare(model, layer, attributor, options, device)


def compare(model: Classifier, layer: str, attributor: str, options: dict[str, float], device: str) -> None:
    """One row: what a vector's field costs in plain gradients."""
    pictures = torch.randn(BATCH, 3, *model.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    functions: dict[str, Callable[[], object]] = {"plain": partial(plain_gradient, model, pictures, layer)}
    for key, count in (("one", 1), ("many", MANY)):
        scalars = first_vectors(model, pictures, layer, count)
        functions[key] = partial(fields, model, pictures, scalars, attributor, options)
    times: dict[str, list[float]] = {key: [] for key in functions}
    for round_ in range(REPEATS + 1):
        for key, function in functions.items():
            seconds = spent(function, device)
            if round_:
                times[key].append(seconds)
    ratios = {
        key: median(mine / plain / count for mine, plain in zip(times[key], times["plain"], strict=True))
        for key, count in (("one", 1), ("many", MANY))
    }
    variant = variant_id(attributor, build_options(attributors.get(attributor), options))
    row(f"{model.spec.name} {variant} batch={BATCH}", **ratios)


def spent(function: Callable[[], object], device: str) -> float:
    """Seconds of the process's CPU time, or of the GPU's."""
    if device != "cpu":
        return timed(function, device)
    started = time.process_time()
    function()
    return time.process_time() - started


def plain_gradient(model: Classifier, pictures: Tensor, layer: str) -> Tensor:
    """Gradient of the squared output of a layer with respect to the pixels."""
    with own_modes("fp32", pictures.device), torch.enable_grad():
        leaves = pictures.detach().requires_grad_(True)
        output = output_of(model, leaves, layer)
        return torch.autograd.grad(output, leaves, output.detach())[0]


def fields(
    model: Classifier, pictures: Tensor, scalars: FeatureVectors, attributor: str, options: dict[str, float]
) -> Tensor:
    """Fields of some vectors, in passes of one picture of each."""
    return receptive_fields(model, pictures, scalars, attributor=attributor, options=options, batch_size=BATCH)


def first_vectors(model: Classifier, pictures: Tensor, layer: str, count: int) -> FeatureVectors:
    """The first vectors of every picture."""
    owner = torch.arange(BATCH).repeat_interleave(count)
    position = torch.arange(count).repeat(BATCH)
    with torch.no_grad():
        clean = to_vectors(model, output_of(model, pictures, layer), layer)
    return feature_vectors(layer, owner, position, clean[owner, position])
