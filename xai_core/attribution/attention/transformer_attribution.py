"""Transition attention maps: a Markov chain over attention, weighted by integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xai_core.attention import patch_map, pooled_head, probed, softmax_attention, token_count
from xai_core.attribution.attention.flow import (
    check_start,
    in_groups,
    mean_heads,
    read_rows,
    start_of,
    start_within,
)
from xai_core.attribution.attention.integrated import check_steps, integrated_feedback
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods


@dataclass(frozen=True)
class TransformerAttributionOptions:
    """``start_layer``: where the chain ends, from 0, by default a third of the depth; ``steps`` of the path."""

    start_layer: int | None = None
    steps: int = 20

    def __post_init__(self) -> None:
        check_start("transformer_attribution", self.start_layer)
        check_steps("transformer_attribution", self.steps)


@methods.register(
    "transformer_attribution",
    options=TransformerAttributionOptions,
    paper="Yuan et al. 2021, Explaining Information Flow Inside Vision Transformers Using Markov Chain",
    equation="transition attention maps",
    families=("vit",),
    needs=(softmax_attention, pooled_head, start_within),
    upsampling="bilinear",
    cost="1 + steps forwards + steps gradients a class of the last block",
    fused_attention="off",
)
def transformer_attribution(
    model: Classifier, images: Tensor, classes: Tensor, options: TransformerAttributionOptions, batch_size: int
) -> Tensor:
    """T-attn (transition attention maps): a Markov chain over attention times integrated attention gradients."""
    start = start_of(model, options.start_layer, share=3)
    rows, weights = read_rows(model)

    def explain(images: Tensor, classes: Tensor) -> Tensor:
        states = _chain(model, images, rows, start)
        feedback = integrated_feedback(model, images, classes, rows, options.steps, batch_size)
        return patch_map(model, (weights[:, None] * states.unsqueeze(1) * feedback).sum(dim=2))

    return in_groups(explain, images, classes, len(rows), token_count(model), batch_size)


def _chain(model: Classifier, images: Tensor, rows: Tensor, start: int) -> Tensor:
    """States ``[B, n, T]`` of a chain from each reading token: last attention, then a step and a stay a block."""
    with probed(model, ["attention"], first=start, reduce={"attention": mean_heads}) as found:
        model(images)
    *earlier, last = found["attention"]
    with full_precision(images.device):
        states = last[:, rows]
        for attention in reversed(earlier):
            states = states + states @ attention
    return states
