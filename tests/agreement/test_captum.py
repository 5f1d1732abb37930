"""Agreement with Captum, an independent implementation of the same definitions."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def test_grad_cam_on_a_cnn() -> None:
    model = tiny_cnn()
    images, targets = pictures(3)
    peer = LayerGradCam(model.module, model.module.layer4).attribute(images, targets, relu_attributions=True)
    ours = attribute(model, images, targets, method="grad_cam", native=True)
    assert pearson(ours, peer.detach()) > 0.999999
    torch.testing.assert_close(ours.double(), peer.detach().squeeze(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_integrated_gradients_by_a_plain_riemann_sum(build) -> None:  # type: ignore[no-untyped-def]
    """Captum computes our maps; its result is checked against the definition and its own other rule."""
    model = build()
    images, targets = pictures(1)
    black = model.normalise(torch.zeros_like(images))
    ours = attribute(model, images, targets, method="integrated_gradients", options={"steps": 100})[0]
    total = torch.zeros_like(images)
    steps = 400
    for step in range(steps):
        point = (black + (step + 0.5) / steps * (images - black)).requires_grad_(True)
        total += torch.autograd.grad(model(point)[0, targets[0]], point)[0] / steps
    expected = ((images - black) * total).sum(1)[0]
    assert pearson(ours, expected) > 0.999
    other = IntegratedGradients(model.module).attribute(
        images, black, targets, n_steps=400, method="riemann_middle"
    )
    assert pearson(ours, other.sum(1)[0].detach()) > 0.999
