"""InFlow: transition matrices of whole blocks, their two residual connections weighed by the tokens' lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from xai_core.attention import patch_map, pooled_head, readout, softmax_attention
from xai_core.attribution.attention.residual_stream import (
    class_gradients,
    exactly,
    forward_pass,
    quotient,
    residual_blocks,
)
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import NoOptions, methods

POINTS = ("block_input", "attention_added", "middle", "mlp_added", "block_output")


@methods.register(
    "information_flow",
    paper="Walker et al. 2025, Explaining ViTs Using Information Flow (InFlow, AISTATS)",
    equation="the authors' code: class-specific attention, both residual connections",
    families=("vit",),
    needs=(softmax_attention, residual_blocks, pooled_head),
    upsampling="bilinear",
    cost="1 forward + two gradients of all attention maps",
    fused_attention="off",
)
def information_flow(
    model: Classifier, images: Tensor, classes: Tensor, options: NoOptions, batch_size: int
) -> Tensor:
    """InFlow: rollout of whole blocks, with skip and branch of each residual sum weighed by their token lengths.

    The attention of a block is the strongest of its heads, weighed by how much the head matters for the class, and
    where raising it would raise the class read off the block's own output.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, K]``, whose logits are differentiated.

    Returns:
        ``[B, K, rows, columns]`` of the token grid.
    """
    passed = forward_pass(model, images, POINTS)
    read_early = _logits_by_block(model, passed.tokens["block_output"])
    with full_precision(images.device):
        connections = _connections(model, passed.tokens)
        read = readout(model)[None]
    maps = []
    for chosen in classes.unbind(dim=1):
        final = class_gradients(passed.logits, chosen, passed.attention)
        row = read
        for position in reversed(range(len(connections))):
            attention = passed.attention[position]
            (early,) = class_gradients(read_early[position], chosen, [attention])
            with full_precision(images.device):
                kept = class_attention(*(exactly(model, one) for one in (attention, final[position], early)))
                row = row @ block_transition(kept, *connections[position])
        maps.append(row.squeeze(1))
    return patch_map(model, torch.stack(maps, dim=1))


def class_attention(attention: Tensor, gradient: Tensor, early_gradient: Tensor) -> Tensor:
    """One matrix ``[B, T, T]`` of the heads ``[B, heads, T, T]``, and the part of it that speaks for the class.

    A head's importance is the mean magnitude of ``A^T dA``, the heads of a block adding to 1; the strongest
    weighed head counts at each entry. ``early_gradient`` is that of the class as read off the block's own output.
    """
    importance = (attention.transpose(-2, -1) @ gradient).abs().mean(dim=(-2, -1), keepdim=True)
    importance = quotient(importance, importance.sum(dim=1, keepdim=True), floor=1e-30)
    return (early_gradient.mean(dim=1) * (attention * importance).amax(dim=1)).relu()


def block_transition(attention: Tensor, skip: Tensor, branch: Tensor, mlp: Tensor) -> Tensor:
    """The block's transition ``[B, T, T]``: ``(A diag branch + diag skip) diag mlp``, its rows adding to 1."""
    matrix = (attention * branch.unsqueeze(1) + torch.diag_embed(skip)) * mlp.unsqueeze(1)
    return quotient(matrix, matrix.sum(dim=-1, keepdim=True), floor=1e-30)


def _connections(model: Classifier, tokens: dict[str, list[Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By block: shares of skip and attention in the first residual sum, the factor of the second; ``[B, T]``."""
    found = []
    for entering, attention, middle, mlp in zip(
        *(tokens[point] for point in ("block_input", "attention_added", "middle", "mlp_added")), strict=True
    ):
        skip, branch = _shares(exactly(model, entering), exactly(model, attention))
        kept, changed = _shares(exactly(model, middle), exactly(model, mlp))
        growth = quotient(changed, kept, floor=1e-30)
        growth = quotient(growth, growth.sum(dim=-1, keepdim=True), floor=1e-30)
        found.append((skip, branch, growth * changed + kept))
    return found


def _shares(skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """How the lengths of two converging tokens ``[B, T, C]`` divide 1; by halves where both are 0."""
    lengths = torch.stack([skip.norm(dim=-1), branch.norm(dim=-1)])
    total = lengths.sum(dim=0)
    shares = torch.where(total > 0, quotient(lengths, total, floor=1e-30), torch.full_like(lengths, 0.5))
    return shares[0], shares[1]


def _logits_by_block(model: Classifier, outputs: list[Tensor]) -> list[Tensor]:
    """The model's own last norm and head applied to each block's output, with the graph."""
    with torch.enable_grad():
        return [model.module.forward_head(model.module.norm(output)) for output in outputs]
