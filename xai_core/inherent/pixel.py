"""PA(p, t): any timm backbone on pictures whose unimportant patches are masked (section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from xai_core.create_args import refuse_pickles
from xai_core.errors import UsageError, nearest
from xai_core.inherent.architectures import Colours, FrozenImportanceNet, three_colours
from xai_core.inherent.patches import check_size, check_threshold, enlarge, grid_side, kept_patches


@dataclass(frozen=True)
class PixelConfig:
    """All that builds a PA(p, t): a timm ``backbone`` with its ``backbone_args``, and what masks its pictures.

    ``patch_size`` is p, ``threshold`` t; ``inverted`` masks the important patches instead of the others.
    ``importance_mean`` and ``importance_std`` are those of the IA whose importance it inherits; the backbone's own
    normalisation is timm's. ``backbone`` stands for the whole picture where t is 0.
    """

    backbone: str = "resnet50"
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    img_size: int = 224
    patch_size: int = 16
    threshold: float = 0.0
    inverted: bool = False
    importance_width: int = 64
    importance_mean: Colours = IMAGENET_DEFAULT_MEAN
    importance_std: Colours = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        grid_side(self.img_size, self.patch_size)
        for name in ("importance_mean", "importance_std"):
            object.__setattr__(self, name, three_colours(name, getattr(self, name)))

    @property
    def whole(self) -> bool:
        """Whether nothing is ever masked: PA(p, 0) is the backbone itself."""
        return self.threshold == 0 and not self.inverted


class PixelMasking(nn.Module):
    """Put before a timm model's class, masks its pictures: it stays that model in all else, layers and names.

    A masked patch has the backbone's normalised 0, its mean colour: what multiplying by a mask gives, and what a
    patch's zeroed embedding is to the embedding architecture.
    """

    config: PixelConfig
    importance_net: FrozenImportanceNet
    renormalise_scale: Tensor
    renormalise_shift: Tensor

    def importance(self, images: Tensor) -> Tensor:
        """Importance a ``[B, h, w]`` in [0, 1] of the patches of pictures that are normalised for the backbone.

        No gradient passes: a threshold is a step.

        Raises:
            UsageError: pictures of another size.
        """
        check_size(images, self.config.img_size)
        with torch.no_grad():
            return self.importance_net(images * self.renormalise_scale + self.renormalise_shift)

    def weigh(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Importance ``[B, h, w]``, and what a mask would be laid on: the pictures as they are."""
        return self.importance(images), images

    def kept(self, importance: Tensor) -> Tensor:
        """Which patches ``[B, h, w]`` are not masked."""
        return kept_patches(importance, self.config.threshold, self.config.inverted)

    def decide(self, masked: Tensor) -> Tensor:
        """The backbone's logits ``[B, classes]`` of pictures that are masked already."""
        features = super().forward_features(masked)
        return self.forward_head(features)

    def forward_features(self, images: Tensor, *rest: Any, **more: Any) -> Any:
        """The backbone's features of the masked pictures."""
        kept = self.kept(self.importance(images))
        masked = images * enlarge(kept, images.shape[-2:])
        return super().forward_features(masked, *rest, **more)


def pixel_architecture(config: PixelConfig, pretrained: bool = False) -> nn.Module:
    """A PA(p, t) with a random importance; where nothing is masked, the plain backbone, with its own keys.

    Args:
        pretrained: whether the backbone begins with timm's weights.

    Raises:
        UsageError: a backbone that timm does not know, one built for another size than ``img_size``, or weights in
            a file that is not safetensors.
    """
    import timm

    if not timm.is_model(config.backbone.split("/")[-1]) or config.backbone.startswith("vitrine_pa"):
        raise UsageError(
            f"backbone: expected a timm model, got {config.backbone!r}; "
            + nearest(config.backbone, timm.list_models())
        )
    refuse_pickles(config.backbone_args, "backbone_args.")
    module = timm.create_model(
        config.backbone, pretrained=pretrained, num_classes=config.num_classes, **config.backbone_args
    )
    _fit_size(module, config)
    if not config.whole:
        _mask_before(module, config)
    module.config = config
    return module


def _fit_size(module: nn.Module, config: PixelConfig) -> None:
    facts: dict[str, Any] = module.pretrained_cfg
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if built is not None and tuple(built) != (config.img_size, config.img_size):
        raise UsageError(
            f"img_size: expected that of {config.backbone}, {built[0]} x {built[1]}, got {config.img_size}; "
            "set img_size in backbone_args as well"
        )
    module.pretrained_cfg = {
        **facts,
        "input_size": (3, config.img_size, config.img_size),
        "num_classes": config.num_classes,
    }


def _mask_before(module: nn.Module, config: PixelConfig) -> None:
    """Gives a backbone an importance, and makes it look at what is left of the picture."""
    facts: dict[str, Any] = module.pretrained_cfg
    mean, std = torch.tensor(facts["mean"]), torch.tensor(facts["std"])
    own_mean, own_std = torch.tensor(config.importance_mean), torch.tensor(config.importance_std)
    module.importance_net = FrozenImportanceNet(config.img_size, config.patch_size, config.importance_width)
    for name, value in (("scale", std / own_std), ("shift", (mean - own_mean) / own_std)):
        module.register_buffer(f"renormalise_{name}", value.view(1, 3, 1, 1), persistent=False)
    # Not a module around the backbone: methods look for layers, blocks and heads where timm has them.
    module.__class__ = type(f"Masked{type(module).__name__}", (PixelMasking, type(module)), {})
