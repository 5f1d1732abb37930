"""Feature vectors of a layer: to and fro between its layout and a list, gradients included."""

from __future__ import annotations

import pytest
import torch

from xai_core.concepts.vectors import from_vectors, prefix, to_vectors
from xai_core.layers import captured
from xai_core.models import ModelSpec, load_classifier

LAYERS = {
    "resnet10t": ("layer2", 0),
    "vit_tiny_patch16_224": ("blocks.1", 1),
    "swin_tiny_patch4_window7_224": ("layers.1", 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_vectors_go_back_into_the_layers_own_layout(name: str) -> None:
    layer, tokens = LAYERS[name]
    model = load_classifier(ModelSpec(name, pretrained=False))
    with torch.no_grad(), captured(model, [layer]) as outputs:
        model(torch.randn(2, 3, *model.input_size))
    activation = outputs[layer]
    vectors = to_vectors(model, activation, layer)
    assert vectors.ndim == 3 and prefix(model, activation) == tokens
    assert torch.equal(from_vectors(model, vectors, activation), activation)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_through_them_are_those_of_a_batch_of_two(count: int) -> None:
    # torch's batch normalisation is wrong for one image whose gradient has other strides.
    model = load_classifier(ModelSpec("resnet10t", pretrained=False))
    norm = torch.nn.BatchNorm2d(8).eval().requires_grad_(False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    norm.double()
    weight = torch.randn(25, 8, generator=torch.Generator().manual_seed(1)).double()

    def slope(some: torch.Tensor) -> torch.Tensor:
        leaf = some.clone().requires_grad_(True)
        again = from_vectors(model, to_vectors(model, leaf, "any").tanh(), leaf)
        (to_vectors(model, norm(again), "any") * weight).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    parts = torch.cat([slope(part) for part in images.split(count)])
    expected = (1 - images.tanh().square()) * (norm.weight * (norm.running_var + norm.eps).rsqrt()).view(-1, 1, 1)
    torch.testing.assert_close(parts, expected * weight.T.unflatten(1, (5, 5)))
