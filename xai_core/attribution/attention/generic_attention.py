"""Generic attention explainability: relevance gathered over blocks from attention times its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attention import patch_map, pooled_head, probed, readout, softmax_attention
from xai_core.attribution.attention.flow import check_start, start_within
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods


@dataclass(frozen=True)
class GenericAttentionOptions:
    """``start_layer``: the first block that counts, from 0."""

    start_layer: int = 0

    def __post_init__(self) -> None:
        check_start("generic_attention", self.start_layer)


@methods.register(
    "generic_attention",
    options=GenericAttentionOptions,
    paper="Chefer et al. 2021, Generic Attention-model Explainability",
    equation="5-6",
    families=("vit",),
    needs=(softmax_attention, pooled_head, start_within),
    upsampling="bilinear",
    cost="1 forward + 1 gradient a class",
    fused_attention="off",
)
def generic_attention(
    model: Classifier, images: Tensor, classes: Tensor, options: GenericAttentionOptions, batch_size: int
) -> Tensor:
    """Generic attention explainability: each block adds positive gradient times attention, times R."""
    read = wide(readout(model))[None]
    with torch.enable_grad(), probed(model, ["attention"], with_gradient=True, first=options.start_layer) as found:
        logits = model(images)
    attentions = [attention.detach() for attention in found["attention"]]

    def gather(gradients: Sequence[Tensor]) -> Tensor:
        with full_precision(images.device):
            relevance = read
            for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
                relevance = relevance + relevance @ (wide(attention) * wide(gradient)).relu().mean(dim=1)
        return patch_map(model, relevance.squeeze(1))

    return per_class(logits, classes, found["attention"], gather)
