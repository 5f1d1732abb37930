"""AttnLRP: layer-wise relevance propagation through the attention of vision transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from xai_core.attribution.propagation.hooks import propagation_rules
from xai_core.attribution.propagation.layers import is_attention
from xai_core.attribution.propagation.lrp import relevance_maps
from xai_core.attribution.propagation.structure import StructureCheck, zennit_installed
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class AttnLrpOptions:
    """``gamma_convolution``, ``gamma_linear``: how much positive contributions are favoured (AttnLRP, table 4).

    In the patch embedding, and in the linear layers outside of attention. 0 is no favour: the epsilon rule with
    epsilon 0.
    """

    gamma_convolution: float = 0.25
    gamma_linear: float = 0.05

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"attn_lrp.{option.name}: expected a number of at least 0, got {value}")


@contextmanager
def attn_lrp_rules(module: nn.Module, options: AttnLrpOptions | None = None) -> Iterator[None]:
    """Under it the gradients of a transformer are relevance divided by activation (AttnLRP, section 3)."""
    from zennit.rules import Gamma

    options = options or AttnLrpOptions()
    convolution = Gamma(options.gamma_convolution) if options.gamma_convolution else None
    linear = Gamma(options.gamma_linear) if options.gamma_linear else None
    projections = {layer for part in module.modules() if is_attention(part) for layer in part.modules()}

    def choose(layer: nn.Module, _source: Tensor) -> Any:
        if layer in projections:
            return None
        return linear if isinstance(layer, nn.Linear) else convolution

    with propagation_rules(module, choose, attention=True):
        yield


_structure = StructureCheck(attn_lrp_rules, attention=True)


def attention_with_rules(model: Classifier, _options: Any) -> str | None:
    """Softmax self-attention (global or in windows), and a rule for every layer around it."""
    if not any(is_attention(module) for module in model.module.modules()):
        return "it has no plain softmax self-attention with one layer for queries, keys and values"
    foreign = _structure.foreign(model)
    return f"outside of layers that have a rule it computes {', '.join(foreign)}" if foreign else None


@methods.register(
    "attn_lrp",
    options=AttnLrpOptions,
    paper="Achtibat et al. 2024, AttnLRP: Attention-aware layer-wise relevance propagation for transformers",
    equation="propositions 3.1, 3.3, 3.4; equations 7-9, 24; table 4",
    needs=(zennit_installed, attention_with_rules),
    cost="1 forward; for each class about 7 more (1 with both gammas 0)",
)
def attn_lrp(
    model: Classifier, images: Tensor, classes: Tensor, options: AttnLrpOptions, batch_size: int
) -> Tensor:
    """AttnLRP: relevance of the class logit, through softmax, matrix products and norms to the pixels."""
    return relevance_maps(model, images, classes, attn_lrp_rules(model.module, options))
