"""Importance Architectures: classifiers that say themselves which patches matter (IA, EA, PA).

Importing this package registers the timm models ``vitrine_ia``, ``vitrine_ea`` and ``vitrine_pa``, the kinds of
training ``ia``, ``ea`` and ``pa``, and the attribution method ``importance``.
"""

from xai_core.inherent import method, objectives, timm_models
from xai_core.inherent.architectures import (
    EmbeddingArchitecture,
    EmbeddingConfig,
    ImportanceArchitecture,
    ImportanceConfig,
)
from xai_core.inherent.checkpoint import inherit_importance, load_importance
from xai_core.inherent.pixel import PixelConfig, pixel_architecture

__all__ = [
    "EmbeddingArchitecture",
    "EmbeddingConfig",
    "ImportanceArchitecture",
    "ImportanceConfig",
    "PixelConfig",
    "inherit_importance",
    "load_importance",
    "method",
    "objectives",
    "pixel_architecture",
    "timm_models",
]
