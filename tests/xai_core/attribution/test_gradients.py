"""Gradient saliency, input times gradient and SmoothGrad against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.xai_core.tiny import CLASSES, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.models import Classifier

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}


def plain_gradient(model: Classifier, image: Tensor, target: int) -> Tensor:
    """The definition, for one image ``[3, H, W]`` and one class."""
    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(leaf.unsqueeze(0))[0, target], leaf)
    return gradient


def join(values: Tensor, channels: str) -> Tensor:
    if channels == "max_abs":
        return torch.stack([values[0].abs(), values[1].abs(), values[2].abs()]).max(dim=0).values
    if channels == "sum_abs":
        return values[0].abs() + values[1].abs() + values[2].abs()
    return values[0] + values[1] + values[2]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("channels", ["max_abs", "sum_abs", "sum"])
def test_gradient_of_every_class_from_the_definition(family: str, channels: str) -> None:
    model = MODELS[family]()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 4]])
    maps = attribute_classes(model, images, classes, method="gradient", options={"channels": channels})
    for b in range(2):
        for k in range(2):
            expected = join(plain_gradient(model, images[b], int(classes[b, k])), channels)
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
def test_input_x_gradient_from_the_definition(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    maps = attribute(model, images, targets, method="input_x_gradient")
    for b in range(2):
        gradient = plain_gradient(model, images[b], int(targets[b]))
        expected = sum(images[b, c] * gradient[c] for c in range(3))
        torch.testing.assert_close(maps[b].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("square", "channels"), [(False, "sum_abs"), (True, "sum"), (False, "max_abs")])
def test_smooth_grad_from_the_formula(square: bool, channels: str) -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    classes = torch.tensor([[1, 2], [3, 0]])
    options = {"samples": 3, "noise": 0.2, "square": square, "channels": channels, "seed": 5}
    maps = attribute_classes(model, images, classes, method="smooth_grad", options=options, batch_size=4)
    for b in range(2):
        for k in range(2):
            mean = torch.zeros_like(images[b])
            for sample in range(3):
                own_seed = int(np.random.SeedSequence((5, sample)).generate_state(1)[0])
                draw = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(own_seed)).double()
                spread = 0.2 * (images[b].max() - images[b].min())
                gradient = plain_gradient(model, images[b] + spread * draw, int(classes[b, k]))
                mean += (gradient**2 if square else gradient) / 3
            torch.testing.assert_close(maps[b, k].double(), join(mean, channels), rtol=1e-6, atol=1e-9)


def test_draws_of_an_image_depend_on_neither_neighbours_nor_batch_size() -> None:
    model = tiny_vit()
    images, targets = pictures(5)
    options = {"samples": 4}
    whole = attribute(model, images, targets, method="smooth_grad", options=options, batch_size=32)
    for size in (1, 3):
        cut = attribute(model, images, targets, method="smooth_grad", options=options, batch_size=size)
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-8)
    alone = attribute(model, images[3:4], targets[3:4], method="smooth_grad", options=options)
    torch.testing.assert_close(alone[0], whole[3], rtol=1e-5, atol=1e-8)
    other = attribute(model, images, targets, method="smooth_grad", options={"samples": 4, "seed": 1})
    assert float((other - whole).abs().max()) > 1e-3 * float(whole.abs().max())


def test_without_noise_smooth_grad_is_the_gradient() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    images[1] = 0.7  # a constant image has no range, so no noise
    for options in ({"samples": 3, "noise": 0.0, "channels": "max_abs"}, {"samples": 3, "channels": "max_abs"}):
        smooth = attribute(model, images, targets, method="smooth_grad", options=options)
        plain = attribute(model, images, targets, method="gradient")
        torch.testing.assert_close(smooth[1], plain[1], rtol=1e-5, atol=1e-9)
        if options.get("noise") == 0.0:
            torch.testing.assert_close(smooth[0], plain[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "options", "forwards"),
    [("gradient", {}, 1), ("input_x_gradient", {}, 1), ("smooth_grad", {"samples": 4}, 4)],
)
def test_classes_share_the_forward_passes(method: str, options: dict, forwards: int) -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    sizes: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    attribute_classes(
        model, images, torch.arange(CLASSES).expand(2, -1), method=method, options=options, batch_size=2
    )
    handle.remove()
    assert sizes == [2] * forwards


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradient", {"channels": "mean"}, r"gradient.channels: expected max_abs, sum_abs, sum, got 'mean'"),
        ("smooth_grad", {"channels": "max"}, r"smooth_grad.channels: expected"),
        ("smooth_grad", {"samples": 0}, r"smooth_grad.samples: expected at least 1, got 0"),
        ("smooth_grad", {"noise": -0.1}, r"smooth_grad.noise: expected a number >= 0, got -0.1"),
        ("smooth_grad", {"noise": float("nan")}, r"smooth_grad.noise: expected"),
        ("smooth_grad", {"seed": -1}, r"smooth_grad.seed: expected"),
        ("integrated_gradients", {"steps": 0}, r"integrated_gradients.steps: expected at least 1, got 0"),
        (
            "integrated_gradients",
            {"baseline": "white"},
            r"integrated_gradients.baseline: expected black, mean, blur",
        ),
        ("guided_backprop", {"channels": "l2"}, r"guided_backprop.channels: expected"),
        ("guided_grad_cam", {"channels": "l2"}, r"guided_grad_cam.channels: expected"),
        ("deep_lift", {"baseline": "blur"}, r"deep_lift.baseline: expected black or mean, got 'blur'"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict, message: str) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=message):
        attribute(tiny_vit(), images, targets, method=method, options=options)
