"""Agreement with Captum, an independent implementation of the same definitions."""

from __future__ import annotations

import torch
from captum.attr import LayerGradCam

from tests.xai_core.tiny import pictures, tiny_cnn
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
