"""TokenTM: attention weighed by how much each token is stretched and turned on its way through a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xai_core.attention import blocks_of, global_attention, patch_map, pooled_head, readout, split_heads
from xai_core.attribution.attention.residual_stream import (
    added_scale,
    exactly,
    forward_pass,
    quotient,
    residual_blocks,
)
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import NoOptions, methods

POINTS = ("block_input", "qkv", "middle", "mlp_added")


@methods.register(
    "token_tm",
    paper="Wu et al. 2024, Token Transformation Matters (CVPR)",
    equation="12-18",
    families=("vit",),
    needs=(global_attention, residual_blocks, pooled_head),
    upsampling="bilinear",
    cost="1 forward + gradient of all attention maps",
    fused_attention="off",
)
def token_tm(model: Classifier, images: Tensor, classes: Tensor, options: NoOptions, batch_size: int) -> Tensor:
    """TokenTM: attention and its gradient weighed by the change of token length and direction in each block.

    A block's matrix is ``(I + diag w_mlp) (I + mean over heads of relu(dA) * A diag w_head)``; the result is the
    product over blocks, last to first, times the lengths of the first tokens, read where the head reads.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, K]``, whose logits are differentiated.

    Returns:
        ``[B, K, rows, columns]`` of the token grid.
    """
    passed = forward_pass(model, images, POINTS)
    blocks, tokens = blocks_of(model), passed.tokens
    with full_precision(images.device):
        start = exactly(model, tokens["block_input"][0]).norm(dim=-1)
        read = readout(model)[None]
        by_head = [
            head_weights(block, exactly(model, entering), split_heads(model, exactly(model, qkv))[2])
            for block, entering, qkv in zip(blocks, tokens["block_input"], tokens["qkv"], strict=True)
        ]
        by_mlp = [
            transformation_weights(exactly(model, middle), exactly(model, added))
            for middle, added in zip(tokens["middle"], tokens["mlp_added"], strict=True)
        ]

    def aggregate(gradients: Sequence[Tensor]) -> Tensor:
        with full_precision(images.device):
            row = read
            for position in reversed(range(len(blocks))):
                row = row * (1 + by_mlp[position].unsqueeze(1))
                attention = exactly(model, passed.attention[position]) * exactly(model, gradients[position]).relu()
                row = row + row @ (attention * by_head[position].unsqueeze(-2)).mean(dim=1)
            return row.squeeze(1) * start

    return patch_map(model, per_class(passed.logits, classes, passed.attention, aggregate))


def transformation_weights(before: Tensor, after: Tensor) -> Tensor:
    """Growth in length times the softmax over tokens of the cosine between before and after (eq. 12-13).

    Args:
        before: tokens ``[..., T, C]``; after: what they are transformed into, alike.

    Returns:
        ``[..., T]``; 0 where the token before is 0.
    """
    return _weights(before.norm(dim=-1), after.norm(dim=-1), (before * after).sum(dim=-1))


def head_weights(block: nn.Module, before: Tensor, values: Tensor) -> Tensor:
    """:func:`transformation_weights` of tokens into their values, as each head's projection writes them.

    Lengths and inner products come from the heads' Gram matrices, so that no head's ``[B, T, C]`` is ever held.

    Args:
        before: tokens as they enter the block ``[B, T, C]``; values: ``[B, heads, T, d]``.

    Returns:
        ``[B, heads, T]``.
    """
    scale = torch.as_tensor(added_scale(block, "ls1"), device=before.device, dtype=before.dtype)
    writing = scale.view(-1, 1) * block.get_submodule("attn.proj").weight.detach().to(before.dtype)
    by_head = writing.unflatten(1, (values.shape[1], -1)).transpose(0, 1)  # [heads, C, d]
    gram = by_head.transpose(1, 2) @ by_head
    length = ((values @ gram) * values).sum(dim=-1).clamp(min=0).sqrt()
    inner = ((before.unsqueeze(1) @ by_head) * values).sum(dim=-1)
    return _weights(before.norm(dim=-1).unsqueeze(1), length, inner)


def _weights(before: Tensor, after: Tensor, inner: Tensor) -> Tensor:
    cosine = quotient(inner, before * after, floor=1e-30)
    return quotient(after, before, floor=1e-30) * cosine.softmax(dim=-1)
