"""Guided backpropagation and Guided Grad-CAM: the rule written as a module of its own, and what is refused."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import NETWORKS, relu_resnet, relu_vgg
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec


class GuidedReLU(torch.autograd.Function):
    """The rule of figure 1: forward a ReLU, backward only where the input and what comes back are positive."""

    @staticmethod
    def forward(ctx, values: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.most = most
        return values.clamp(0, most)

    @staticmethod
    def backward(ctx, later: Tensor):
        (values,) = ctx.saved_tensors
        return later * (values > 0) * (values < ctx.most) * (later > 0), None


class GuidedModule(nn.Module):
    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, values: Tensor) -> Tensor:
        return GuidedReLU.apply(values, self.most)


def guided_twin(model: Classifier) -> nn.Module:
    twin = copy.deepcopy(model.module)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, name, GuidedModule(6.0 if isinstance(child, nn.ReLU6) else float("inf")))
    return twin


def guided_gradient(twin: nn.Module, image: Tensor, target: int) -> Tensor:
    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(twin(leaf.unsqueeze(0))[0, target], leaf)
    return gradient


@pytest.mark.parametrize("network", NETWORKS)
def test_every_class_from_the_rule(network: str) -> None:
    model = NETWORKS[network]()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    maps = attribute_classes(model, images, classes, method="guided_backprop")
    plain = attribute_classes(model, images, classes, method="gradient")
    twin = guided_twin(model)
    for b in range(2):
        for k in range(2):
            expected = guided_gradient(twin, images[b], int(classes[b, k])).abs().amax(dim=0)
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-9)
    assert float((maps - plain).abs().max()) > 0.1 * float(plain.max())


@pytest.mark.parametrize("layer", [None, "features.4"])
def test_guided_grad_cam_is_the_product_at_the_inputs_size(layer: str | None) -> None:
    model = relu_vgg()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    maps = attribute_classes(
        model, images, classes, method="guided_grad_cam", options={"layer": layer, "channels": "sum"}
    )
    twin = guided_twin(model)
    for b in range(2):
        for k in range(2):
            kept: list[Tensor] = []

            def keep(_module, _inputs, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
                output = output.detach().requires_grad_(True)
                kept.append(output)
                return output

            handle = model.module.get_submodule(layer or "features").register_forward_hook(keep)
            logit = model(images[b : b + 1])[0, classes[b, k]]
            handle.remove()
            (gradient,) = torch.autograd.grad(logit, kept[0])
            cam = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0].detach()).sum(dim=1, keepdim=True).relu()
            cam = F.interpolate(cam, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
            expected = guided_gradient(twin, images[b], int(classes[b, k])).sum(dim=0) * cam
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-9)


def test_nothing_is_left_of_the_rule() -> None:
    model = relu_resnet()
    images, targets = pictures(2)
    before = attribute(model, images, targets, method="gradient")
    attribute(model, images, targets, method="guided_backprop")
    assert torch.equal(attribute(model, images, targets, method="gradient"), before)
    assert not any(module._backward_hooks or module._forward_hooks for module in model.module.modules())


class FunctionalNetwork(nn.Module):
    """ReLUs that are no modules, one module used twice, and, if so wished, a GELU hidden in a function."""

    num_classes = CLASSES
    pretrained_cfg: ClassVar[dict] = {}

    def __init__(self, gelu: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)
        self.gelu = gelu

    def forward_features(self, images: Tensor) -> Tensor:
        values = F.relu(self.first(images))
        values = torch.relu(self.twice(values))
        values = self.twice(values).relu_()
        return F.gelu(values) if self.gelu else values

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=(2, 3)))


def functional(gelu: bool = False) -> Classifier:
    torch.manual_seed(0)
    spec = ModelSpec("functional", False, transform={"input_size": (3, SIZE, SIZE)})
    return Classifier(FunctionalNetwork(gelu).double(), spec)


def test_relu_called_as_a_function_is_guided_too() -> None:
    model = functional()
    images, targets = pictures(1)
    maps = attribute(model, images, targets, method="guided_backprop")
    leaf = images.clone().requires_grad_(True)
    network = model.module
    values = GuidedReLU.apply(network.first(leaf), float("inf"))
    values = GuidedReLU.apply(network.twice(values), float("inf"))
    values = GuidedReLU.apply(network.twice(values), float("inf"))
    (expected,) = torch.autograd.grad(network.head(values.mean(dim=(2, 3)))[0, targets[0]], leaf)
    torch.testing.assert_close(maps.double(), expected.abs().amax(dim=1), rtol=1e-6, atol=1e-9)


def gated() -> Classifier:
    module = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)
    return Classifier(module, ModelSpec("mobilenetv3_small_050", False, transform={"input_size": (3, 32, 32)}))


def linear() -> Classifier:
    module = FunctionalNetwork()
    module.forward_features = lambda images: module.first(images)  # type: ignore[method-assign]
    return Classifier(module, ModelSpec("linear", False, transform={"input_size": (3, SIZE, SIZE)}))


@pytest.mark.parametrize("method", ["guided_backprop", "guided_grad_cam"])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_vit, "a rule for ReLU, and this network computes GELU, attention"),
        (tiny_cnn, "this network computes SiLU, where its result would be a plain gradient"),
        (lambda: functional(gelu=True), "this network computes GELU"),
        (gated, "Hardsigmoid, Hardswish, products of activations"),
        (linear, "it has no ReLU"),
    ],
)
def test_other_networks_are_refused_with_the_reason(method: str, build, reason: str) -> None:
    model = build()
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=model.dtype)
    with pytest.raises(UsageError, match=reason):
        attribute(model, images, torch.tensor([0]), method=method)


def test_what_is_known_of_a_network_follows_its_modules() -> None:
    model = relu_resnet()
    images, targets = pictures(1)
    attribute(model, images, targets, method="guided_backprop")
    model.module.layer1[0].act1 = nn.GELU()
    with pytest.raises(UsageError, match="GELU"):
        attribute(model, images, targets, method="guided_backprop")


def test_group_normalisation_is_no_activation_function() -> None:
    torch.manual_seed(0)
    module = timm.create_model(
        "resnet10t", num_classes=CLASSES, norm_layer="groupnorm1", channels=(8, 8, 16, 16), stem_width=8
    )
    spec = ModelSpec("resnet10t", False, transform={"input_size": (3, SIZE, SIZE)})
    model = Classifier(module.double(), spec)
    images, targets = pictures(1)
    maps = attribute(model, images, targets, method="guided_backprop", options={"channels": "sum"})
    expected = guided_gradient(guided_twin(model), images[0], int(targets[0])).sum(dim=0)
    torch.testing.assert_close(maps[0].double(), expected, rtol=1e-6, atol=1e-9)
