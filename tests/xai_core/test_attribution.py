"""The method interface: its refusals, native and enlarged maps, painted parts; and Grad-CAM from its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, paint_parts, score_parts
from xai_core.errors import UsageError


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


def test_upsampling_is_bilinear_from_the_native_map() -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    native = attribute(model, images, targets, method="grad_cam", native=True)
    full = attribute(model, images, targets, method="grad_cam")
    torch.testing.assert_close(
        full, F.interpolate(native[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    )
