"""Tiny random classifiers in float64, for twins written from the formulas."""

from __future__ import annotations

import timm
import torch
from torch import Tensor

from xai_core.models import Classifier, ModelSpec

SIZE = 32
CLASSES = 5


def tiny_vit() -> Classifier:
    """A two-block ViT with a class token and 16 patch tokens."""
    torch.manual_seed(0)
    arguments = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": CLASSES,
    }
    module = timm.create_model("vit_tiny_patch16_224", **arguments).double()
    return Classifier(_lively(module), ModelSpec("vit_tiny_patch16_224", False, create_args=arguments))


def tiny_cnn() -> Classifier:
    """A small convolutional network without kinks (SiLU, no max pooling), whose Hessian exists everywhere."""
    torch.manual_seed(0)
    arguments = {
        "num_classes": CLASSES,
        "channels": (8, 8, 16, 16),
        "act_layer": "silu",
        "stem_width": 8,
        "replace_stem_pool": True,
    }
    module = timm.create_model("resnet10t", **arguments).double()
    transform = {"input_size": (3, SIZE, SIZE)}
    return Classifier(_lively(module), ModelSpec("resnet10t", False, create_args=arguments, transform=transform))


def tiny_relu_cnn() -> Classifier:
    """A small residual network of convolutions, batch norms and ReLUs, with a max pooling: piecewise linear."""
    torch.manual_seed(0)
    arguments = {"num_classes": CLASSES, "channels": (8, 8, 16, 16), "stem_width": 8}
    module = timm.create_model("resnet10t", **arguments).double()
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.running_mean.uniform_(-0.3, 0.3)
            child.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(child.weight, 0.5, 1.5)
            torch.nn.init.uniform_(child.bias, -0.3, 0.3)
    with torch.no_grad():
        module.fc.weight.mul_(2.0 / module.eval()(pictures(4)[0]).std())
    transform = {"input_size": (3, SIZE, SIZE)}
    return Classifier(module, ModelSpec("resnet10t", False, create_args=arguments, transform=transform))


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Random heads start near zero; larger weights make probabilities differ."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            with torch.no_grad():
                parameter.mul_(3.0 if "head" in name or "fc" in name else 1.5)
    return module


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Random inputs and targets in float64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def quarters(count: int) -> Tensor:
    """Four square parts; the second image has three, and a corner that belongs to none."""
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    half = SIZE // 2
    labels[:, :half, half:] = 1
    labels[:, half:, :half] = 2
    labels[:, half:, half:] = 3
    if count > 1:
        labels[1][labels[1] == 3] = 255
    return labels
