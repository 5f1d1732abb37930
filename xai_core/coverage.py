"""Which method explains which network: tried on random weights at a small resolution, never asserted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from xai_core.attribution import attribute, fit_method
from xai_core.attribution.interface import misfit
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.parts import parse_parts
from xai_core.registry import MethodEntry, methods

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A kind of network and the timm model that stands for it, shrunk."""

    title: str
    model: str
    create_args: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Classifier:
        """The network with random weights."""
        arguments = {"num_classes": CLASSES, **self.create_args}
        transform = {} if "img_size" in arguments else {"input_size": (3, 64, 64)}
        return load_classifier(ModelSpec(self.model, False, create_args=arguments, transform=transform))


_VIT = {"img_size": 64}
NETWORKS: dict[str, Network] = {
    network.title: network
    for network in (
        Network("resnet18", "resnet18"),
        Network("resnet50", "resnet50"),
        Network("vgg16", "vgg16"),
        Network("densenet121", "densenet121"),
        Network("convnext_tiny", "convnext_tiny"),
        Network("mobilenetv2_100", "mobilenetv2_100"),
        Network("efficientnet_b0", "efficientnet_b0"),
        Network("swin_tiny", "swin_tiny_patch4_window7_224", _VIT),
        Network("vit_tiny", "vit_tiny_patch16_224", _VIT),
        Network("deit_tiny", "deit_tiny_patch16_224", _VIT),
        Network("deit_tiny distilled", "deit_tiny_distilled_patch16_224", _VIT),
        Network("register tokens", "vit_small_patch14_reg4_dinov2", {"img_size": 56}),
        Network(
            "no class token", "vit_base_patch16_gap_224", {**_VIT, "embed_dim": 192, "num_heads": 3, "depth": 6}
        ),
    )
}

# Budgets that show whether a method works, not what it finds.
SMALL_BUDGETS: dict[str, dict[str, Any]] = {
    "ablation_cam": {"channels": 16},
    "bi_attention": {"steps": 2},
    "hu_mcd": {"fit_images": 2, "min_size": 2},
    "integrated_gradients": {"steps": 3},
    "kernel_shap": {"samples": 16},
    "kernel_shap_patches": {"samples": 32, "grid": 3},
    "lime": {"samples": 16},
    "occlusion": {"window": 16, "stride": 16},
    "rise": {"masks": 8, "grid": 4},
    "score_cam": {"channels": 16},
    "smooth_grad": {"samples": 2},
    "transformer_attribution": {"steps": 2},
    "visual_tcav": {"steps": 2, "fit_images": 2, "concept_count": 2},
}


@dataclass(frozen=True)
class Covered:
    """What came of one method on one network: ``refusal`` is the reason, or None where it gave a map."""

    method: str
    network: str
    refusal: str | None


def try_method(entry: MethodEntry, network: str, model: Classifier) -> Covered:
    """A method on two random images: its refusal, or a finite map of the input's size.

    Raises:
        RuntimeError: a map of another shape, or one that is not finite.
    """
    options = SMALL_BUDGETS.get(entry.name, {})
    reason = misfit(entry, model, entry.options(**options))
    if reason is not None:
        return Covered(entry.name, network, reason)
    height, width = model.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height, width, generator=generator)
    targets = torch.tensor([1, CLASSES - 1])
    parts = parse_parts(model, images, parser="grid", k=6)
    shared: dict[str, Any] = {"method": entry.name, "options": options, "parts": parts}
    fitted = fit_method(model, images, targets, **shared) if entry.fit else None
    maps = attribute(model, images, targets, **shared, fitted=fitted)
    if maps.shape != (2, height, width) or not bool(maps.isfinite().all()):
        raise RuntimeError(
            f"{entry.name} on {network}: expected a finite map (2, {height}, {width}), got {tuple(maps.shape)}, "
            f"{int((~maps.isfinite()).sum())} values not finite"
        )
    return Covered(entry.name, network, None)


def coverage() -> Iterator[Covered]:
    """Every method on every one of :data:`NETWORKS`."""
    for title, network in NETWORKS.items():
        model = network.build()
        for entry in methods:
            yield try_method(entry, title, model)
