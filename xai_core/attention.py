"""Reading a vision transformer: its blocks, what flows through them, and the tokens that its head reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image

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
# Points of blocks that add an attention branch, then an MLP branch; only methods that ask for them need them.
BRANCHES: dict[str, tuple[str, bool]] = {
    "attention_added": ("ls1", False),  # what the attention branch adds to the residual stream [B, T, C]
    "middle": ("norm2", True),  # the residual stream between the branches
    "mlp_input": ("mlp.fc1", True),
    "mlp_hidden": ("mlp.fc2", True),  # after the activation
    "mlp_added": ("ls2", False),
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
    model: Classifier,
    points: Sequence[str],
    *,
    with_gradient: bool = False,
    first: int = 0,
    reduce: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[dict[str, list[Tensor]]]:
    """Collects, block by block, what passes the named :data:`POINTS` (or :data:`BRANCHES`) in the forward pass
    inside the block.

    Attention is explicit inside. With ``with_gradient`` (gradients must be enabled) the first of the tensors to be
    reached becomes a leaf of the graph, so that the backward pass costs only what lies behind it.

    Args:
        first: the first transformer block to read, from 0; those before it run as ever, and unrecorded.
        reduce: by point, what to keep of a tensor in its place, such as the mean of the heads.
    """
    found: dict[str, list[Tensor]] = {point: [] for point in points}
    shortened = reduce or {}

    def keep(point: str, tensor: Tensor) -> Tensor:
        if with_gradient and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_(True)
        found[point].append(shortened[point](tensor) if point in shortened else tensor)
        return tensor

    def before(point: str):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: (keep(point, inputs[0]), *inputs[1:])

    def after(point: str):  # type: ignore[no-untyped-def]
        return lambda _module, _inputs, output: keep(point, output)

    handles = []
    try:
        for block in blocks_of(model)[first:]:
            for point in points:
                path, entering = (POINTS | BRANCHES)[point]
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
    count, width = token_count(model), model.module.num_features
    generator = torch.Generator().manual_seed(0)
    features, direction = torch.randn(2, 1, count, width, generator=generator).to(model.device, model.dtype)
    with torch.enable_grad():
        features.requires_grad_(True)
        # Before the classifier, whose weights may be zero; along a direction, as a norm fixes the length.
        pooled = model.module.forward_head(features, pre_logits=True)
        (gradient,) = torch.autograd.grad((pooled * direction[:, 0]).sum(), features)
    read = gradient[0].abs().amax(dim=1) > 0
    return read.to(model.dtype) / read.sum()


def token_count(model: Classifier) -> int:
    """Prefix and patch tokens together."""
    rows, columns = model.token_grid
    return model.num_prefix_tokens + rows * columns


def patch_map(model: Classifier, tokens: Tensor) -> Tensor:
    """Values of all tokens ``[..., T]`` as a map of the patch tokens ``[..., rows, columns]``.

    Raises:
        UsageError: the images had another size than the model's preprocessing yields.
    """
    if tokens.shape[-1] != token_count(model):
        raise UsageError(
            f"{model.spec.name}: expected {token_count(model)} tokens (inputs of {model.input_size}), "
            f"got {tokens.shape[-1]}; give images of that size"
        )
    return tokens[..., model.num_prefix_tokens :].unflatten(-1, model.token_grid)


def softmax_attention(model: Classifier, _options: Any) -> str | None:
    """Transformer blocks whose softmax attention over all tokens is in reach."""
    return _unreached(model, ("attention",))


def global_attention(model: Classifier, _options: Any) -> str | None:
    """Blocks of plain self-attention over all tokens, each with its softmax probabilities in reach."""
    reason = _unreached(model, tuple(POINTS))
    if reason is not None:
        return reason
    if not _trial(model)["plain"]:
        return "its attention does more than weigh values by softmax probabilities before the projection"
    return None


def pooled_head(model: Classifier, _options: Any) -> str | None:
    """A head that reads the class token, or the mean of tokens."""
    pool = getattr(model.module, "global_pool", None)
    if getattr(model.module, "attn_pool", None) is not None or pool not in ("token", "avg"):
        return f"its head pools tokens by {pool!r}, so no row of the attention says what the head reads"
    return None


def _unreached(model: Classifier, points: Sequence[str]) -> str | None:
    blocks = getattr(model.module, "blocks", None)
    if not blocks:
        return "it has no list of transformer blocks"
    if not isinstance(getattr(getattr(model.module, "patch_embed", None), "patch_size", None), (tuple, list)):
        return "its patch embedding does not say how large a patch is, so its tokens have no place in the image"
    for point in points:
        path, _ = POINTS[point]
        if any(not _has(block, path) for block in blocks):
            return f"its blocks have no {path!r}: not self-attention of the usual build"
    shapes = _trial(model)["shapes"]
    for point in points:
        if len(shapes[point]) != len(blocks):
            return f"its attention does not pass through {POINTS[point][0]!r} once a block"
        if len(set(shapes[point])) != 1:
            return f"its blocks differ in size at {POINTS[point][0]!r}"
    count = token_count(model)
    shape = shapes["attention"][0]
    if len(shape) != 4 or shape[-2:] != (count, count):
        return f"its attention is not between all {count} tokens: {tuple(shape[1:])} a picture"
    if shape[1] != blocks[0].attn.num_heads:
        return f"it has {shape[1]} attention matrices for {blocks[0].attn.num_heads} heads"
    return None if _trial(model)["stochastic"] else "what weighs its values is not a softmax over all tokens"


@once_per_model
def _trial(model: Classifier) -> dict[str, Any]:
    """What one random picture leaves at the points that a model's blocks have."""
    blocks = blocks_of(model)
    points = [point for point, (path, _) in POINTS.items() if all(_has(block, path) for block in blocks)]
    with torch.no_grad(), probed(model, points) as found:
        model.module.forward_features(probe_image(model))
    attention = found.get("attention", [])
    return {
        "shapes": {point: [tensor.shape for tensor in tensors] for point, tensors in found.items()},
        "stochastic": all(
            bool((one >= 0).all()) and _close(one.sum(dim=-1), torch.ones_like(one[..., 0])) for one in attention
        ),
        "plain": _weighs_values(model, found),
    }


def _weighs_values(model: Classifier, found: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether what enters the projection is attention times values, heads joined, in every block."""
    named = [found.get(point, []) for point in ("attention", "qkv", "mixed")]
    if len({len(tensors) for tensors in named}) != 1:
        return False
    for attention, qkv, mixed in zip(*named, strict=True):
        if qkv.shape[-1] != 3 * mixed.shape[-1]:
            return False
        _, _, values = split_heads(model, qkv)
        if attention.shape[:-1] != values.shape[:-1]:
            return False
        if not _close((attention @ values).transpose(1, 2).flatten(2), mixed):
            return False
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
