"""Two small classifiers of the synthetic toys, registered with timm together with their packaged weights.

Importing this module makes `timm.create_model("vitrine_demo_vit", pretrained=True)` work without a network;
the weights come from `xai_core.train_demo_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

from xai_core.synthetic import CLASS_NAMES, IMAGE_SIZE

__all__: list[str] = []

DEMO_MODELS = ("vitrine_demo_resnet", "vitrine_demo_vit")


def weights_path(name: str) -> Path:
    """Where the packaged safetensors file of demo model `name` lies."""
    return Path(__file__).parent / "weights" / f"{name}.safetensors"


def _pretrained_cfg(name: str, **specific: Any) -> dict[str, Any]:
    return {
        "file": str(weights_path(name)),
        "num_classes": len(CLASS_NAMES),
        "label_names": CLASS_NAMES,
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "license": "apache-2.0",
        **specific,
    }


default_cfgs = generate_default_cfgs(
    {
        "vitrine_demo_resnet": _pretrained_cfg(
            "vitrine_demo_resnet", first_conv="conv1", classifier="fc", pool_size=(8, 8)
        ),
        "vitrine_demo_vit": _pretrained_cfg(
            "vitrine_demo_vit",
            first_conv="patch_embed.proj",
            classifier="head",
            pool_size=None,
            fixed_input_size=True,
        ),
    }
)


@register_model
def vitrine_demo_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Narrow ResNet-10 of basic blocks whose last feature map is 8x8."""
    shape = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 64, 128),
        "output_stride": 16,
    }
    return build_model_with_cfg(ResNet, "vitrine_demo_resnet", pretrained, **{**shape, **kwargs})


@register_model
def vitrine_demo_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Vision transformer of 64 patches of 16 pixels and a class token, 4 blocks of 3 heads."""
    shape = {
        "img_size": IMAGE_SIZE,
        "patch_size": 16,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
    }
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionTransformer,
        "vitrine_demo_vit",
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )
