"""What the tests of receptive fields share: scalars of tiny networks, and their gradients one at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.vectors import to_vectors
from xai_core.models import Classifier
from xai_core.receptive_fields import feature_vectors, output_of
from xai_core.receptive_fields.scalars import FeatureVectors

LAYERS = {"resnet10t": "layer3", "vit_tiny_patch16_224": "blocks.1"}


def layer_of(model: Classifier) -> str:
    return LAYERS[model.spec.name]


def clean_vectors(model: Classifier, images: Tensor, layer: str) -> Tensor:
    with torch.no_grad():
        return to_vectors(model, output_of(model, images, layer), layer)


def vectors_at(
    model: Classifier, images: Tensor, owner: list[int], position: list[int], layer: str | None = None
) -> FeatureVectors:
    """Scalars of the vectors at some places."""
    layer = layer or layer_of(model)
    owners, places = torch.tensor(owner), torch.tensor(position)
    return feature_vectors(layer, owners, places, clean_vectors(model, images, layer)[owners, places])


def autoencoder(channels: int, atoms: int = 12, seed: int = 0) -> Dictionary:
    """A random dictionary with an encoder, most of whose latents are on somewhere."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(atoms, channels, generator=generator, dtype=torch.float32)
    encoder = {
        "weight": weight,
        "bias": 0.3 * torch.randn(atoms, generator=generator, dtype=torch.float32),
        "offset": torch.zeros(channels, dtype=torch.float32),
    }
    return Dictionary(weight.clone(), torch.ones(atoms, dtype=torch.int64), encoder, "sae")


def gradient_of_one(
    model: Classifier, image: Tensor, layer: str, read: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A scalar of one picture ``[3, H, W]`` and its gradient, through a pass of the whole network.

    ``read`` makes a number of the layer's vectors ``[P, C]``.
    """
    kept: list[Tensor] = []
    handle = model.layer(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.enable_grad():
        pixels = image.detach().clone().requires_grad_(True)
        model(pixels.unsqueeze(0))
        handle.remove()
        value = read(to_vectors(model, kept[0], layer)[0])
        (gradient,) = torch.autograd.grad(value, pixels)
    return value.detach(), gradient


def agree(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
