"""The three architectures as timm models: ``timm.create_model("vitrine_ia", patch_size=16, embed_dim=128)``.

So a study names one as its model, and a checkpoint of a training is one of these models' weights.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import nn

from xai_core.errors import UsageError
from xai_core.inherent.architectures import (
    EmbeddingArchitecture,
    EmbeddingConfig,
    ImportanceArchitecture,
    ImportanceConfig,
)
from xai_core.inherent.pixel import PixelConfig, pixel_architecture

__all__: list[str] = []

# What timm hands to every model beside its arguments.
_FROM_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@register_model
def vitrine_ia(pretrained: bool = False, **arguments: Any) -> ImportanceArchitecture:
    """IA(p, k); its arguments are the fields of ``ImportanceConfig``."""
    _refuse_pretrained("vitrine_ia", pretrained)
    return ImportanceArchitecture(ImportanceConfig(**_own(arguments)))


@register_model
def vitrine_ea(pretrained: bool = False, **arguments: Any) -> EmbeddingArchitecture:
    """EA(p, k); its arguments are the fields of ``EmbeddingConfig``."""
    _refuse_pretrained("vitrine_ea", pretrained)
    return EmbeddingArchitecture(EmbeddingConfig(**_own(arguments)))


@register_model
def vitrine_pa(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """PA(p, t); its arguments are the fields of ``PixelConfig``, ``pretrained`` is about the backbone."""
    return pixel_architecture(PixelConfig(**_own(arguments)), pretrained)


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _FROM_TIMM}


def _refuse_pretrained(name: str, pretrained: bool) -> None:
    if pretrained:
        raise UsageError(
            f"model.pretrained: there are no weights of {name} to fetch: train one (vitrine train importance) and "
            "name its file in model.checkpoint, or set model.pretrained to false for random weights"
        )
