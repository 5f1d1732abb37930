"""Reading a vision transformer: its blocks, what flows through them, and the tokens that its head reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.models import Classifier

# What can be read of a block: the submodule it passes through, and whether as its first input or its output.
POINTS: dict[str, tuple[str, bool]] = {
    "block_input": ("", True),
    "block_output": ("", False),
    "normed": ("attn", True),  # tokens as they enter the attention
    "qkv": ("attn.qkv", False),  # [B, T, 3 * heads * head_dim]: queries, keys, values
    "attention": ("attn.attn_drop", False),  # softmax probabilities [B, heads, T, T]
    "mixed": ("attn.proj", True),  # attention times values, heads joined [B, T, C]
    "attention_output": ("attn", False),  # after the projection, before the residual sum
    "mlp_output": ("mlp", False),
}


@contextmanager
def explicit_attention(module: nn.Module) -> Iterator[None]:
    """Computes attention step by step inside the block, so that probabilities and second derivatives exist.

    Fused attention kernels have neither. Only this module's flags change, not the process's.
    """
    fused = [child for child in module.modules() if getattr(child, "fused_attn", False)]
    for child in fused:
        child.fused_attn = False
    try:
        yield
    finally:
        for child in fused:
            child.fused_attn = True


def blocks_of(model: Classifier) -> list[nn.Module]:
    """The transformer blocks of a model that has :func:`global_attention`, first to last."""
    return list(model.module.blocks)


@contextmanager
def probed(
    model: Classifier, points: Sequence[str], *, with_gradient: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Collects, block by block, what passes the named :data:`POINTS` in the forward passes inside the block.

    Attention is explicit inside. With ``with_gradient`` (gradients must be enabled) the first of the tensors to be
    reached becomes a leaf of the graph, so that the backward pass costs only what lies behind it.
    """
    found: dict[str, list[Tensor]] = {point: [] for point in points}

    def keep(point: str, tensor: Tensor) -> Tensor:
        if with_gradient and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
        found[point].append(tensor)
        return tensor

    def before(point: str):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: (keep(point, inputs[0]), *inputs[1:])

    def after(point: str):  # type: ignore[no-untyped-def]
        return lambda _module, _inputs, output: keep(point, output)

    handles = []
    try:
        for block in blocks_of(model):
            for point in points:
                path, entering = POINTS[point]
                place = block.get_submodule(path)
                handles.append(
                    place.register_forward_pre_hook(before(point))
                    if entering
                    else place.register_forward_hook(after(point))
                )
        with explicit_attention(model.module):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def split_heads(model: Classifier, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The point ``qkv`` of a block as queries, keys and values, ``[B, heads, T, head_dim]`` each."""
    heads = blocks_of(model)[0].attn.num_heads
    batch, tokens, _ = qkv.shape
    queries, keys, values = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return queries, keys, values


def readout(model: Classifier) -> Tensor:
    """The weight with which the head reads each token, ``[T]``, adding to 1.

    The class token alone, class and distillation token by halves, or all pooled tokens alike.
    """
    rows, columns = model.token_grid
    count = model.num_prefix_tokens + rows * columns
    width = model.module.num_features
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, count, width, generator=generator).to(model.device, model.dtype)
    with torch.enable_grad():
        features.requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.module.forward_head(features).square().sum(), features)
    read = gradient[0].abs().amax(dim=1) > 0
    return read.to(model.dtype) / read.sum()


def patch_map(model: Classifier, tokens: Tensor) -> Tensor:
    """Values of all tokens ``[..., T]`` as a map of the patch tokens ``[..., rows, columns]``."""
    return tokens[..., model.num_prefix_tokens :].unflatten(-1, model.token_grid)


def global_attention(model: Classifier, _options: Any) -> str | None:
    """Blocks of plain self-attention over all tokens, each with its softmax probabilities in reach."""
    blocks = getattr(model.module, "blocks", None)
    if not blocks:
        return "it has no list of transformer blocks"
    missing = [path for path, _ in POINTS.values() if any(not _has(block, path) for block in blocks)]
    if missing:
        return (
            f"its blocks have no {missing[0]!r}: not plain self-attention with one layer for queries, keys, values"
        )
    sizes = {tuple(block.attn.qkv.weight.shape) for block in blocks}
    return None if len(sizes) == 1 else "its blocks differ in width"


def pooled_head(model: Classifier, _options: Any) -> str | None:
    """A head that reads the class token, or the mean of tokens."""
    pool = getattr(model.module, "global_pool", None)
    if getattr(model.module, "attn_pool", None) is not None or pool not in ("token", "avg"):
        return f"its head pools tokens by {pool!r}, so no row of the attention says what the head reads"
    return None


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
