"""Agreement of the gradient family with Captum, and the places where Captum's rule is another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from captum.attr import (
    DeepLift,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from captum.attr._core import deep_lift as captum_deep_lift
from PIL import Image
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import NETWORKS, relu6_mobilenet, relu_resnet, relu_vgg
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.gradients.gradient import sample_noise
from xai_core.models import Classifier, ModelSpec, load_classifier

SMOOTH: dict[str, Callable[[], Classifier]] = {"vit": tiny_vit, "cnn": tiny_cnn}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def black(model: Classifier, images: Tensor) -> Tensor:
    return model.normalise(torch.zeros_like(images))


def real(shared: Path, name: str) -> tuple[Classifier, Tensor, Tensor]:
    """A model with its real weights in float64 and one photograph, with the class it is taken for."""
    same = name == "mobilenetv2_100"
    spec = ModelSpec(
        name,
        checkpoint=str(shared / "models" / f"{name}.safetensors"),
        create_args={"pad_type": "same"} if same else {},
        transform={"mean": (0.5,) * 3, "std": (0.5,) * 3} if same else {},
    )
    model = load_classifier(spec)
    photograph = min((shared / "imagenet-sample" / "images").rglob("*.jpg"))
    images = model.preprocess(Image.open(photograph)).unsqueeze(0).double()
    model.module.double()
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


def assert_agree(ours: Tensor, peer: Tensor) -> None:
    peer = peer.detach()
    assert pearson(ours, peer) > 0.999999
    scale = float(peer.abs().max())
    torch.testing.assert_close(ours.double() / scale, peer / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", SMOOTH)
def test_gradient_and_input_x_gradient(family: str) -> None:
    model = SMOOTH[family]()
    images, targets = pictures(3)
    ours = attribute(model, images, targets, method="gradient")
    assert_agree(ours, Saliency(model.module).attribute(images, targets, abs=True).amax(dim=1))
    ours = attribute(model, images, targets, method="input_x_gradient")
    assert_agree(ours, InputXGradient(model.module).attribute(images.clone(), targets).sum(dim=1))


@pytest.mark.parametrize("family", SMOOTH)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_integrated_gradients_of_several_classes(family: str, steps: int) -> None:
    model = SMOOTH[family]()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 3], [4, 1], [2, 2]])
    ours = attribute_classes(
        model, images, classes, method="integrated_gradients", options={"steps": steps}, batch_size=4
    )
    peer = IntegratedGradients(model.module)
    for k in range(2):
        theirs = peer.attribute(images, black(model, images), classes[:, k], n_steps=steps).sum(dim=1)
        assert_agree(ours[:, k], theirs)


@pytest.mark.parametrize("family", SMOOTH)
def test_integrated_gradients_by_a_plain_riemann_sum(family: str) -> None:
    model = SMOOTH[family]()
    images, targets = pictures(1)
    ours = attribute(model, images, targets, method="integrated_gradients", options={"steps": 100})
    theirs = IntegratedGradients(model.module).attribute(
        images, black(model, images), targets, n_steps=400, method="riemann_middle"
    )
    assert pearson(ours, theirs.sum(1).detach()) > 0.999


@pytest.mark.parametrize(("square", "kind"), [(False, "smoothgrad"), (True, "smoothgrad_sq")])
def test_smooth_grad_with_the_same_noise(square: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captum draws anew for every image, with one deviation for all; given our draws, the maps are the same."""
    model = tiny_cnn()
    images, targets = pictures(1)
    deviation = 0.15 * float(images.max() - images.min())
    noise = sample_noise(0, slice(0, 6), 1, images)
    monkeypatch.setattr(torch, "normal", lambda mean, deviations: mean + deviations * noise)
    tunnel = NoiseTunnel(Saliency(model.module))
    theirs = tunnel.attribute(
        images, nt_type=kind, nt_samples=6, stdevs=deviation, target=int(targets[0]), abs=False
    )
    monkeypatch.undo()
    options = {"samples": 6, "square": square}
    ours = attribute(model, images, targets, method="smooth_grad", options=options)
    assert_agree(ours, theirs.abs().sum(dim=1))


@pytest.mark.parametrize("network", ["resnet", "densenet", "vgg"])
def test_guided_backprop(network: str) -> None:
    model = NETWORKS[network]()
    images, targets = pictures(2)
    ours = attribute(model, images, targets, method="guided_backprop", options={"channels": "sum"})
    assert_agree(ours, GuidedBackprop(model.module).attribute(images.clone(), targets).sum(dim=1))


@pytest.mark.parametrize("layer", ["layer2", "layer3"])
def test_guided_grad_cam(layer: str) -> None:
    model = relu_resnet()
    images, targets = pictures(2)
    options = {"layer": layer, "channels": "sum"}
    ours = attribute(model, images, targets, method="guided_grad_cam", options=options)
    peer = GuidedGradCam(model.module, model.module.get_submodule(layer))
    assert_agree(ours, peer.attribute(images.clone(), targets, interpolate_mode="bilinear").sum(dim=1))


class BoundedReLU(nn.ReLU):
    """ReLU6 that Captum takes for a ReLU."""

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.relu6(values)


def replaced(module: nn.Module, old: type[nn.Module], new: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy in which modules of one type are others."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is old:
                setattr(parent, name, new(child))
    return module


def test_captum_leaves_relu6_unguided() -> None:
    """On MobileNetV2 Captum's guided backpropagation is the plain gradient, without a word; ours guides ReLU6."""
    model = relu6_mobilenet()
    images, targets = pictures(2)
    ours = attribute(model, images, targets, method="guided_backprop", options={"channels": "sum"})
    theirs = GuidedBackprop(model.module).attribute(images.clone(), targets).sum(dim=1)
    plain = attribute(model, images, targets, method="gradient", options={"channels": "sum"})
    assert_agree(plain, theirs)
    assert pearson(ours, theirs.detach()) < 0.5
    taught = replaced(model.module, nn.ReLU6, lambda _: BoundedReLU())
    assert_agree(ours, GuidedBackprop(taught).attribute(images.clone(), targets).sum(dim=1))


def test_deep_lift_without_max_pooling() -> None:
    model = relu_resnet(pooling=False)
    images, targets = pictures(2)
    ours = attribute(model, images, targets, method="deep_lift")
    theirs = DeepLift(model.module).attribute(images.clone(), black(model, images), targets)
    assert_agree(ours, theirs.sum(dim=1))


class Elsewhere(nn.Module):
    """The same values in another tensor."""

    def forward(self, values: Tensor) -> Tensor:
        return values.clone()


def test_deep_lift_where_max_pooling_follows_a_relu() -> None:
    """Captum's max-pooling rule goes unheard right behind another nonlinearity, and its sum is not the change.

    Both hooks then hang on one tensor, and the earlier layer's reads the gradient before the later layer's has
    replaced it. With a copy of the tensor in between, the maps are the same.
    """
    model = relu_vgg()
    images, targets = pictures(2)
    start = black(model, images)
    ours = attribute(model, images, targets, method="deep_lift")
    change = (model(images) - model(start)).gather(1, targets.view(-1, 1)).squeeze(1)
    theirs = DeepLift(model.module).attribute(images.clone(), start, targets).sum(dim=1).detach()
    assert float((theirs.sum(dim=(1, 2)) - change).abs().max()) > 1e-2 * float(change.abs().max())
    assert float((ours.double().sum(dim=(1, 2)) - change).abs().max()) < 1e-5 * float(change.abs().max())
    apart = replaced(model.module, nn.MaxPool2d, lambda pool: nn.Sequential(Elsewhere(), pool))
    assert_agree(ours, DeepLift(apart).attribute(images.clone(), start, targets).sum(dim=1))


def test_deep_lift_where_max_pooling_windows_overlap() -> None:
    """Captum gives a pixel only one of the windows that it wins; ours adds them, so that the sum is the change."""
    model = relu_resnet()
    images, targets = pictures(2)
    start = black(model, images)
    apart = replaced(model.module, nn.MaxPool2d, lambda pool: nn.Sequential(Elsewhere(), pool))
    theirs = DeepLift(apart).attribute(images.clone(), start, targets).sum(dim=1).detach()
    change = (model(images) - model(start)).gather(1, targets.view(-1, 1)).squeeze(1)
    ours = attribute(model, images, targets, method="deep_lift")
    assert float((theirs.sum(dim=(1, 2)) - change).abs().max()) > 1e-2 * float(change.abs().max())
    assert float((ours.double().sum(dim=(1, 2)) - change).abs().max()) < 1e-5 * float(change.abs().max())


def test_captum_leaves_silu_and_relu6_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captum knows neither in DeepLIFT, and does not say so; taught them, it agrees."""
    for build, kind in ((tiny_cnn, nn.SiLU), (relu6_mobilenet, nn.ReLU6)):
        model = build()
        images, targets = pictures(2)
        start = black(model, images)
        ours = attribute(model, images, targets, method="deep_lift")
        change = (model(images) - model(start)).gather(1, targets.view(-1, 1)).squeeze(1)
        theirs = DeepLift(model.module).attribute(images.clone(), start, targets).sum(dim=1).detach()
        assert float((theirs.sum(dim=(1, 2)) - change).abs().max()) > 1e-2 * float(change.abs().max())
        monkeypatch.setitem(captum_deep_lift.SUPPORTED_NON_LINEAR, kind, captum_deep_lift.nonlinear)
        assert_agree(ours, DeepLift(model.module).attribute(images.clone(), start, targets).sum(dim=1))


@pytest.mark.parametrize("name", ["mobilenetv2_100", "deit_tiny_patch16_224"])
def test_gradients_of_real_weights(name: str, shared_data: Path) -> None:
    model, images, targets = real(shared_data, name)
    ours = attribute(model, images, targets, method="gradient")
    assert_agree(ours, Saliency(model.module).attribute(images, targets, abs=True).amax(dim=1))
    ours = attribute(model, images, targets, method="input_x_gradient")
    assert_agree(ours, InputXGradient(model.module).attribute(images.clone(), targets).sum(dim=1))
    ours = attribute(model, images, targets, method="integrated_gradients", options={"steps": 5})
    theirs = IntegratedGradients(model.module).attribute(images, black(model, images), targets, n_steps=5)
    assert_agree(ours, theirs.sum(dim=1))


def test_relu_rules_of_real_weights(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets = real(shared_data, "mobilenetv2_100")
    taught = replaced(model.module, nn.ReLU6, lambda _: BoundedReLU())
    ours = attribute(model, images, targets, method="guided_backprop", options={"channels": "sum"})
    assert_agree(ours, GuidedBackprop(taught).attribute(images.clone(), targets).sum(dim=1))
    ours = attribute(model, images, targets, method="guided_grad_cam", options={"layer": "bn2", "channels": "sum"})
    theirs = GuidedGradCam(taught, taught.bn2).attribute(images.clone(), targets, interpolate_mode="bilinear")
    assert_agree(ours, theirs.sum(dim=1))
    monkeypatch.setitem(captum_deep_lift.SUPPORTED_NON_LINEAR, nn.ReLU6, captum_deep_lift.nonlinear)
    ours = attribute(model, images, targets, method="deep_lift")
    theirs = DeepLift(model.module).attribute(images.clone(), black(model, images), targets)
    assert_agree(ours, theirs.sum(dim=1))
