"""The residual stream of a vision transformer: one recorded pass, and what blocks must be like to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.attention import BRANCHES, POINTS, blocks_of, probed
from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image


@dataclass(frozen=True)
class Pass:
    """What one forward pass left: logits ``[B, C]`` and attention ``[B, heads, T, T]`` with their graph.

    ``features`` are the tokens that enter the head ``[B, T, C]``; ``tokens`` holds the asked points by block.
    """

    logits: Tensor
    features: Tensor
    attention: list[Tensor]
    tokens: dict[str, list[Tensor]]


def forward_pass(model: Classifier, images: Tensor, points: Sequence[str], first: int = 0) -> Pass:
    """One pass whose graph starts at the attention of block ``first``, with the named points from there on."""
    with (
        torch.enable_grad(),
        probed(model, points, first=first) as tokens,
        probed(model, ["attention"], with_gradient=True, first=first) as found,
    ):
        features = model.module.forward_features(images)
        logits = model.module.forward_head(features)
    return Pass(logits, features, found["attention"], tokens)


def class_gradients(logits: Tensor, classes: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the logits ``[B, C]`` of one class an image ``[B]``; the graph stays for the next class."""
    with torch.enable_grad():
        score = logits.gather(1, classes.view(-1, 1)).sum()
    gradients = torch.autograd.grad(score, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(gradients)


def exactly(model: Classifier, tensor: Tensor) -> Tensor:
    """A recorded tensor without its graph and in the weights' type, whatever the precision of the pass."""
    return tensor.detach().to(model.dtype)


def quotient(numerator: Tensor, denominator: Tensor, floor: float = 1e-9) -> Tensor:
    """``numerator / denominator``: 0 where the denominator is 0, which ``floor`` moves away from it elsewhere."""
    away = torch.where(denominator < 0, denominator - floor, denominator + floor)
    return torch.where(denominator == 0, torch.zeros_like(away), numerator / away)


def added_scale(block: nn.Module, name: str) -> Tensor | float:
    """The factors ``[C]`` of a block's layer scale (``ls1``, ``ls2``); 1 where it has none."""
    gamma: Tensor | None = getattr(block.get_submodule(name), "gamma", None)
    return 1.0 if gamma is None else gamma.detach()


def residual_blocks(model: Classifier, _options: Any) -> str | None:
    """Blocks that add attention of the normalised tokens, then a two-layer MLP of the normalised tokens.

    Layer scale and norms of queries and keys may be there; the last norm and the head follow the last block.
    Judged by a trial pass: each part must be what the parts before it make it.
    """
    return _trial(model)


@once_per_model
def _trial(model: Classifier) -> str | None:
    blocks = list(getattr(model.module, "blocks", None) or [])
    points = POINTS | BRANCHES
    modules = [dict(block.named_modules()) for block in blocks]
    missing = [path for path, _ in points.values() if any(path not in names for names in modules)]
    if not blocks or missing:
        return f"its blocks have no {(missing or ['attn'])[0]!r}: not an attention branch and an MLP branch"
    with torch.no_grad(), probed(model, list(points)) as found:
        logits = model(probe_image(model))
        if any(len(found[point]) != len(blocks) for point in points):
            return "its blocks do not pass through each of their parts once"
        for position, block in enumerate(blocks_of(model)):
            odd = _odd_part(block, {point: tensors[position] for point, tensors in found.items()})
            if odd is not None:
                return f"its blocks are not an attention branch and an MLP branch, each added: {odd}"
        norm = getattr(model.module, "norm", None)
        if norm is None or not _alike(model.module.forward_head(norm(found["block_output"][-1])), logits):
            return "its last block is not followed by a norm and the head alone"
    return None


def _odd_part(block: Any, at: dict[str, Tensor]) -> str | None:
    """What a block computes otherwise than :func:`residual_blocks` says, given what passed its points."""
    attention, heads = block.attn, block.attn.num_heads
    queries, keys, values = at["qkv"].unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if values.shape[-2] != at["attention"].shape[-1]:
        return "its attention is not between all tokens"
    norms = [getattr(attention, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    scores = norms[0](queries) @ norms[1](keys).transpose(-2, -1) * attention.scale
    mixed = (at["attention"] @ values).transpose(1, 2).flatten(2)
    expected = {
        "normed": block.norm1(at["block_input"]),
        "attention": scores.softmax(dim=-1),
        "mixed": mixed,
        "attention_added": attention.proj(mixed) * added_scale(block, "ls1"),
        "middle": at["block_input"] + at["attention_added"],
        "mlp_input": block.norm2(at["middle"]),
        "mlp_hidden": block.mlp.act(block.mlp.fc1(at["mlp_input"])),
        "mlp_added": block.mlp.fc2(at["mlp_hidden"]) * added_scale(block, "ls2"),
        "block_output": at["middle"] + at["mlp_added"],
    }
    return next((f"{point!r} differs" for point, made in expected.items() if not _alike(made, at[point])), None)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * other.abs().max())
