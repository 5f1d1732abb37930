"""FullGrad beside pytorch-grad-cam's: the terms are the same, the scaling is another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytorch_grad_cam import FullGrad
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from tests.xai_core.attribution.relu_networks import relu6_mobilenet, relu_resnet
from tests.xai_core.tiny import SIZE, pictures
from xai_core.attribution import attribute
from xai_core.attribution.gradients.full_grad import full_gradients
from xai_core.models import Classifier


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def their_map(model: Classifier, images: Tensor, target: int) -> Tensor:
    with FullGrad(model.module, []) as peer:
        return torch.from_numpy(peer(images.clone(), [ClassifierOutputTarget(target)])[0])


def their_scaling(term: Tensor) -> Tensor:
    """Every channel scaled to [0, 1] on its own."""
    if term.ndim != 4:
        return term.new_zeros(len(term), SIZE, SIZE)
    magnitude = term.abs()
    magnitude = magnitude - magnitude.amin(dim=(2, 3), keepdim=True)
    magnitude = magnitude / (magnitude.amax(dim=(2, 3), keepdim=True) + 1e-7)
    return F.interpolate(magnitude, size=(SIZE, SIZE), mode="bilinear", align_corners=False).sum(dim=1)


def test_terms_are_the_same_and_the_scaling_is_another() -> None:
    """Scaled a channel each, as there, our terms give its map; the paper's scaling, a layer each, gives ours.

    Scaled by themselves, channels that say nothing weigh as much as those that carry the logit.
    """
    model = relu_resnet()
    images, targets = pictures(1)
    theirs = their_map(model, images, int(targets[0]))
    ours_scaled_so = full_gradients(model, images, targets.view(-1, 1), their_scaling)[0, 0]
    assert pearson(ours_scaled_so, theirs) > 0.999
    ours = attribute(model, images, targets, method="full_grad")[0]
    assert 0.3 < pearson(ours, theirs) < 0.999


def test_batch_norms_that_activate_are_left_out_there() -> None:
    """The peer asks for the exact type, and timm's BatchNormAct2d is a subclass: MobileNetV2 has no bias there."""
    model = relu6_mobilenet()
    images, targets = pictures(1)
    theirs = their_map(model, images, int(targets[0]))
    leaf = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(leaf)[0, targets[0]], leaf)
    only_input = their_scaling(images * gradient)[0]
    assert pearson(only_input, theirs) > 0.999
    assert pearson(attribute(model, images, targets, method="full_grad")[0], theirs) < 0.9
