"""Pixel methods: properties, the interface's refusals, and what they leave of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, paint_parts, score_parts
from xai_core.errors import UsageError
from xai_core.registry import methods

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
PIXEL_METHODS = [entry.name for entry in methods if entry.output == "pixels"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", methods.names())
def test_maps_have_the_input_size_whatever_the_batch(family: str, method: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    parts = quarters(3)
    maps = attribute(model, images, targets, method=method, parts=parts, batch_size=8)
    single = attribute(model, images, targets, method=method, parts=parts, batch_size=1)
    assert maps.shape == (3, SIZE, SIZE)
    assert torch.isfinite(maps).all()
    assert float(maps.abs().max()) > 0
    torch.testing.assert_close(single, maps, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", methods.names())
def test_callers_gradient_mode_changes_nothing(family: str, method: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    usual = attribute(model, images, targets, method=method, parts=quarters(2))
    with torch.no_grad():
        without = attribute(model, images, targets, method=method, parts=quarters(2))
    torch.testing.assert_close(without, usual)
    assert not images.requires_grad


@pytest.mark.parametrize("family", MODELS)
def test_integrated_gradients_are_complete(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    black = model.normalise(torch.zeros_like(images))
    maps = attribute(model, images, targets, method="integrated_gradients", options={"steps": 200})
    difference = (model(images) - model(black)).gather(1, targets.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(maps.flatten(1).sum(1).double(), difference, rtol=1e-2, atol=1e-3)


def test_grad_cam_from_the_formula_on_a_cnn() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    for b in range(2):
        activation = model.module.forward_features(images[b : b + 1]).detach().requires_grad_(True)
        score = model.module.forward_head(activation)[0, targets[b]]
        (gradient,) = torch.autograd.grad(score, activation)
        height, width = activation.shape[-2:]
        expected = torch.zeros(height, width, dtype=torch.float64)
        for channel in range(activation.shape[1]):
            expected += gradient[0, channel].mean() * activation[0, channel].detach()
        got = attribute(model, images[b : b + 1], targets[b : b + 1], method="grad_cam", native=True)
        torch.testing.assert_close(got[0].double(), expected.relu(), rtol=1e-5, atol=1e-7)


def test_grad_cam_reads_patch_tokens_only() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    native = attribute(model, images, targets, method="grad_cam", native=True)
    assert native.shape == (2, 4, 4)
    named = attribute(model, images, targets, method="grad_cam", native=True, options={"layer": "blocks.1.norm1"})
    torch.testing.assert_close(native, named)


def test_painted_parts_are_box_means_of_the_scores() -> None:
    labels = quarters(2)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, float("nan")]])
    painted = paint_parts(scores, labels)
    for b, y, x in [(0, 0, 0), (0, 15, 15), (1, 16, 16), (1, 31, 31), (0, 20, 15)]:
        window = labels[b, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        values = [0.0 if label == 255 else float(scores[b, label]) for label in window.flatten().tolist()]
        assert float(painted[b, y, x]) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_unknown_method_names_the_nearest() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=r"unknown method 'gradcam': did you mean 'grad_cam'"):
        attribute(tiny_vit(), images, targets, method="gradcam")


def test_requests_that_cannot_be_met_are_refused() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    with pytest.raises(UsageError, match=f"targets in 0..{CLASSES - 1}, got 0..{CLASSES}"):
        attribute(model, images, torch.tensor([0, CLASSES]), method="grad_cam")
    with pytest.raises(UsageError, match="scores parts: expected labels"):
        attribute(model, images, targets, method="kl_hessian")
    with pytest.raises(UsageError, match="yields pixel maps"):
        score_parts(model, images, targets, quarters(2), method="grad_cam")
    with pytest.raises(UsageError, match=r"layer 'blocks.7': expected a module"):
        attribute(model, images, targets, method="grad_cam", options={"layer": "blocks.7"})
    with pytest.raises(UsageError, match="expected an output with spatial positions"):
        attribute(model, images, targets, method="grad_cam", options={"layer": "head"})
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_blank_image_gives_finite_maps() -> None:
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
    for family in MODELS.values():
        for method in methods.names():
            maps = attribute(family(), images, torch.tensor([0]), method=method, parts=quarters(1))
            assert torch.isfinite(maps).all()


def test_upsampling_is_bilinear_from_the_native_map() -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    native = attribute(model, images, targets, method="grad_cam", native=True)
    full = attribute(model, images, targets, method="grad_cam")
    torch.testing.assert_close(
        full, F.interpolate(native[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    )
