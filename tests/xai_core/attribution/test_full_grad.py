"""FullGrad: terms measured by shifting each layer's output, the sum that they make up, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import NETWORKS
from tests.xai_core.attribution.test_guided_backprop import FunctionalNetwork, functional, gated
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.gradients.full_grad import full_gradients, rescaled_magnitude
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec


def total(term: Tensor) -> Tensor:
    return term.flatten(1).sum(dim=1)


@pytest.mark.parametrize("network", [*NETWORKS, "silu", "functional"])
def test_terms_add_to_every_logit(network: str) -> None:
    """The full-gradient decomposition is complete; SiLU by its implicit biases, ReLU6 by those beyond 6."""
    model = {"silu": tiny_cnn, "functional": functional, **NETWORKS}[network]()
    images = pictures(3)[0]
    classes = torch.arange(CLASSES).expand(3, -1)
    sums = full_gradients(model, images, classes, total)
    torch.testing.assert_close(sums, model(images), rtol=1e-9, atol=1e-11)
    # The biases matter here: without them it would not add up.
    only_input = attribute_classes(model, images, classes, method="input_x_gradient").sum(dim=(2, 3)).double()
    assert float((only_input - sums).abs().max()) > 1e-2 * float(sums.abs().max())


def terms_by_shifts(model: Classifier, image: Tensor, target: int) -> list[Tensor]:
    """Bias times gradient of every convolution and batch norm, from shifts added to the modules' outputs."""
    shifts: list[Tensor] = []
    biases: list[Tensor] = []

    def shifted(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if isinstance(module, nn.BatchNorm2d):
            scale = module.weight / (module.running_var + module.eps) ** 0.5
            biases.append(module.bias - module.running_mean * scale)
        elif module.bias is not None:
            biases.append(module.bias)
        else:
            return output
        shifts.append(torch.zeros_like(output, requires_grad=True))
        return output + shifts[-1]

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [m.register_forward_hook(shifted) for m in model.module.modules() if isinstance(m, kinds)]
    leaf = image.clone().requires_grad_(True)
    logit = model(leaf)[0, target]
    for handle in handles:
        handle.remove()
    gradient, *gradients = torch.autograd.grad(logit, [leaf, *shifts])
    return [
        image * gradient,
        *(bias.view(1, -1, 1, 1) * one for bias, one in zip(biases, gradients, strict=True)),
    ]


@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_every_class_from_the_formula(network: str) -> None:
    model = NETWORKS[network]()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    maps = attribute_classes(model, images, classes, method="full_grad")
    for b in range(2):
        for k in range(2):
            expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
            for term in terms_by_shifts(model, images[b : b + 1], int(classes[b, k])):
                magnitude = term.abs()
                if magnitude.shape[-2:] == (1, 1) or magnitude.max() == magnitude.min():
                    continue
                scaled = (magnitude - magnitude.min()) / (magnitude.max() - magnitude.min())
                for channel in range(term.shape[1]):
                    one = scaled[:, channel : channel + 1]
                    expected += F.interpolate(one, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-7)


def test_terms_are_scaled_an_image_and_layer() -> None:
    term = torch.tensor([[[[1.0, -3.0]], [[2.0, 5.0]]], [[[10.0, -30.0]], [[20.0, 50.0]]]])
    first, second = rescaled_magnitude(term, (1, 2))
    torch.testing.assert_close(first, torch.tensor([[0.25, 1.5]]))
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("term", [torch.ones(2, 4, 3, 3), torch.ones(2, 4, 1, 1), torch.ones(2, 7)])
def test_a_term_without_places_or_contrast_counts_nothing(term: Tensor) -> None:
    assert torch.equal(rescaled_magnitude(term, (6, 6)), torch.zeros(2, 6, 6))


def test_nothing_is_left_on_the_model() -> None:
    model = NETWORKS["resnet"]()
    images, targets = pictures(2)
    with pytest.raises(ZeroDivisionError):
        full_gradients(model, images, targets.view(-1, 1), lambda term: 1 / 0)
    assert not any(module._backward_hooks or module._forward_hooks for module in model.module.modules())
    leaf = images.clone().requires_grad_(True)
    assert torch.autograd.grad(model(leaf).sum(), leaf)[0].isfinite().all()


class Shifted(FunctionalNetwork):
    """A constant added to the features: a bias that no layer owns."""

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images) + 0.7


def shifted() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Shifted().double(), ModelSpec("shifted", False, transform={"input_size": (3, SIZE, SIZE)}))


def normalised() -> Classifier:
    import timm

    module = timm.create_model("convnext_atto", num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    return Classifier(module, ModelSpec("convnext_atto", False, transform={"input_size": (3, 32, 32)}))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_vit, "it fits cnn models"),
        (normalised, "do not make up its logit: it has layer normalisation"),
        (gated, "do not make up its logit: it has products of activations"),
        (shifted, "the terms of its logit add to .* instead of"),
    ],
)
def test_other_networks_are_refused_with_the_reason(build, reason: str) -> None:
    model = build()
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=model.dtype)
    with pytest.raises(UsageError, match=reason):
        attribute(model, images, torch.tensor([0]), method="full_grad")
