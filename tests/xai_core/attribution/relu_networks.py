"""Tiny random networks in float64 that are piecewise linear: what ReLU rules, DeepLIFT and FullGrad fit."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vgg import VGG

from tests.xai_core.tiny import CLASSES, SIZE
from xai_core.models import Classifier, ModelSpec


def relu_resnet(pooling: bool = True) -> Classifier:
    """Residual, batch normalised, with in-place ReLUs and, if so wished, a max pooling whose windows overlap."""
    return _built("resnet10t", channels=(8, 8, 16, 16), stem_width=8, replace_stem_pool=not pooling)


def relu_densenet() -> Classifier:
    """Concatenations, batch normalisation and activation in one module, average pooling."""
    return _built("densenet121", growth_rate=4, block_config=(2, 2))


def relu6_mobilenet() -> Classifier:
    """Inverted residuals with ReLU6, which also bounds from above."""
    return _built("mobilenetv2_035")


def relu_vgg() -> Classifier:
    """No normalisation, max pooling whose windows do not overlap, convolutions as the head."""
    torch.manual_seed(0)
    layers = [8, "M", 8, "M", 16, "M"]
    module = VGG(cfg=layers, num_classes=CLASSES, mlp_ratio=0.01)
    return _lively(module, "vgg11", {})


NETWORKS = {
    "resnet": relu_resnet,
    "densenet": relu_densenet,
    "mobilenet": relu6_mobilenet,
    "vgg": relu_vgg,
}


def _built(name: str, **arguments: Any) -> Classifier:
    torch.manual_seed(0)
    arguments["num_classes"] = CLASSES
    return _lively(timm.create_model(name, **arguments), name, arguments)


def _lively(module: torch.nn.Module, name: str, arguments: dict[str, Any]) -> Classifier:
    """Biases and statistics away from 0 and 1, so that none could be left out unnoticed."""
    module = module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.ndim == 1:
                drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(drawn + 0.5 if key.endswith(("weight", "var")) else drawn - 0.5)
    spec = ModelSpec(name, False, create_args=arguments, transform={"input_size": (3, SIZE, SIZE)})
    return Classifier(module, spec)
