"""Bidirectional attribution: what tokens perceive block by block, times what the class's score feeds back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attention import (
    blocks_of,
    global_attention,
    patch_map,
    pooled_head,
    probed,
    softmax_attention,
    split_heads,
    token_count,
)
from xai_core.attribution.attention.flow import (
    check_start,
    in_groups,
    mean_heads,
    read_rows,
    start_of,
    start_within,
)
from xai_core.attribution.attention.integrated import check_steps, integrated_feedback
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods

VERSIONS = ("head", "token")


@dataclass(frozen=True)
class BiAttentionOptions:
    """``version``: how blocks are approximated, by "head" or "token"; ``start_layer``: the first block, from 0.

    By default after a quarter of the blocks; ``steps``: pictures of the integration path.
    """

    version: str = "head"
    start_layer: int | None = None
    steps: int = 20

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise UsageError(f"bi_attention.version: expected one of {', '.join(VERSIONS)}, got {self.version!r}")
        check_start("bi_attention", self.start_layer)
        check_steps("bi_attention", self.steps)


def attention_of_version(model: Classifier, options: BiAttentionOptions) -> str | None:
    """Softmax attention over all tokens in reach; for the token version its plain values too."""
    return (global_attention if options.version == "token" else softmax_attention)(model, options)


@methods.register(
    "bi_attention",
    options=BiAttentionOptions,
    paper="Chen et al. 2023, Beyond Intuition: Rethinking Token Attributions inside Transformers",
    equation="attention perception and reasoning feedback, token-wise or head-wise",
    families=("vit",),
    needs=(attention_of_version, pooled_head, start_within),
    upsampling="bilinear",
    cost="1 + steps forwards + 1 gradient a class (head version) + steps gradients a class of the last block",
    fused_attention="off",
)
def bi_attention(
    model: Classifier, images: Tensor, classes: Tensor, options: BiAttentionOptions, batch_size: int
) -> Tensor:
    """Bi-attn (bidirectional attribution): attention perception times integrated reasoning feedback."""
    start = start_of(model, options.start_layer, share=4)
    rows, weights = read_rows(model)

    def explain(images: Tensor, classes: Tensor) -> Tensor:
        if options.version == "head":
            perception = _head_perception(model, images, classes, rows, start)
        else:
            perception = _token_perception(model, images, rows, start).unsqueeze(1)
        feedback = integrated_feedback(model, images, classes, rows, options.steps, batch_size)
        return patch_map(model, (weights[:, None] * perception * feedback).sum(dim=2))

    return in_groups(explain, images, classes, len(rows), token_count(model), batch_size)


def _head_perception(model: Classifier, images: Tensor, classes: Tensor, rows: Tensor, start: int) -> Tensor:
    """Rows ``[B, K, n, T]`` of the product of ``I + A``: heads joined by their importance for the class."""
    with torch.enable_grad(), probed(model, ["attention"], with_gradient=True, first=start) as found:
        logits = model(images)
    attentions = [attention.detach() for attention in found["attention"]]

    def perceive(gradients: Sequence[Tensor]) -> Tensor:
        with full_precision(images.device):
            seen = _start_rows(wide(attentions[0]), rows)
            for attention, gradient in zip(map(wide, reversed(attentions)), reversed(gradients), strict=True):
                joined = (_head_shares(attention, wide(gradient))[..., None, None] * attention).sum(dim=1)
                seen = seen + seen @ joined
        return seen

    return per_class(logits, classes, found["attention"], perceive)


def _head_shares(attention: Tensor, gradient: Tensor) -> Tensor:
    """Shares of the heads ``[B, heads]`` by the mean of ``|A^T G|``; equal ones where no head matters."""
    importance = (attention.mT @ gradient).abs().mean(dim=(-2, -1))
    total = importance.sum(dim=1, keepdim=True)
    return torch.where(total > 0, importance / total, 1 / importance.shape[1])


def _token_perception(model: Classifier, images: Tensor, rows: Tensor, start: int) -> Tensor:
    """Rows ``[B, n, T]`` of the product of ``I + A M``: M scales tokens by how their values' length changes."""
    kept = {"attention": mean_heads, "block_input": _lengths, "qkv": wide}
    with probed(model, ["block_input", "qkv", "attention"], first=start, reduce=kept) as found:
        model(images)
    with full_precision(images.device):
        seen = _start_rows(found["attention"][0], rows)
        for place in reversed(range(len(found["attention"]))):
            _, _, values = split_heads(model, found["qkv"][place])
            weight = wide(blocks_of(model)[start + place].attn.proj.weight)
            before = found["block_input"][place]
            after = _lengths(values.transpose(1, 2).flatten(2) @ weight.T)
            scale = torch.where(before > 0, after / before, 0)
            seen = seen + (seen @ found["attention"][place]) * scale.unsqueeze(1)
    return seen


def _start_rows(like: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, n, T]`` of the identity."""
    identity = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)[rows]
    return identity.expand(len(like), -1, -1)


def _lengths(tokens: Tensor) -> Tensor:
    return wide(tokens).norm(dim=-1)
