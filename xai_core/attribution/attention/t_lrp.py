"""T-LRP: relevance of each attention map by deep Taylor rules, times its gradient, rolled out over the blocks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from xai_core.attention import blocks_of, global_attention, patch_map, pooled_head, readout, split_heads
from xai_core.attribution.attention.flow import check_start, start_within
from xai_core.attribution.attention.residual_stream import (
    Pass,
    class_gradients,
    exactly,
    forward_pass,
    quotient,
    residual_blocks,
)
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods

POINTS = (
    "block_input",
    "normed",
    "qkv",
    "mixed",
    "attention_added",
    "middle",
    "mlp_input",
    "mlp_hidden",
    "mlp_added",
)


@dataclass(frozen=True)
class TLrpOptions:
    """``start_layer``: the first block whose attention counts, from 0; 0 as in the authors' code."""

    start_layer: int = 0

    def __post_init__(self) -> None:
        check_start("t_lrp", self.start_layer)


def linear_head(model: Classifier, _options: TLrpOptions) -> str | None:
    """A linear layer as the head, or one each for class and distillation token, averaged."""
    heads = (getattr(model.module, "head", None), getattr(model.module, "head_dist", nn.Linear(1, 1)))
    return None if all(isinstance(head, nn.Linear) for head in heads) else "its head is not a linear layer"


@methods.register(
    "t_lrp",
    options=TLrpOptions,
    paper="Chefer et al. 2021, Transformer Interpretability Beyond Attention Visualization (CVPR)",
    equation="3-14",
    families=("vit",),
    needs=(global_attention, residual_blocks, pooled_head, linear_head, start_within),
    upsampling="bilinear",
    cost="1 forward + gradient of all attention maps + relevance (about 4 forwards), in float64",
    fused_attention="off",
    half_precision=False,
)
def t_lrp(model: Classifier, images: Tensor, classes: Tensor, options: TLrpOptions, batch_size: int) -> Tensor:
    """T-LRP: rollout of attention maps by the positive part of their relevance times their gradient.

    A block's matrix is ``I + mean over heads of relu(dA * R)``, R the relevance of its attention when the class's
    logit is propagated down; the result is the product over blocks, last to first, read where the head reads.

    All in float64: the rules divide by sums that cross zero, where float32's rounding of activations shows.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, K]``, whose logits are differentiated and propagated.

    Returns:
        ``[B, K, rows, columns]`` of the token grid.
    """
    model = _in_double(model)
    passed = forward_pass(model, images.to(model.dtype), POINTS, first=options.start_layer)
    read = readout(model)
    maps = []
    for chosen in classes.unbind(dim=1):
        gradients = class_gradients(passed.logits, chosen, passed.attention)
        with full_precision(images.device):
            maps.append(_rollout(model, passed, chosen, gradients, read))
    return patch_map(model, torch.stack(maps, dim=1))


def _in_double(model: Classifier) -> Classifier:
    """The classifier with a float64 copy of its weights, itself where it has such weights."""
    if model.dtype == torch.float64:
        return model
    return Classifier(deepcopy(model.module).double(), model.spec)


def _rollout(model: Classifier, passed: Pass, chosen: Tensor, gradients: list[Tensor], read: Tensor) -> Tensor:
    row = read[None]
    relevance = head_relevance(model, exactly(model, passed.features), chosen, read)
    blocks = blocks_of(model)[-len(passed.attention) :]
    for position in reversed(range(len(blocks))):
        at = {point: exactly(model, tensors[position]) for point, tensors in passed.tokens.items()}
        at["attention"] = exactly(model, passed.attention[position])
        of_attention, relevance = block_relevance(model, blocks[position], at, relevance, last=position == 0)
        weighed = (of_attention * exactly(model, gradients[position])).relu().mean(dim=1)
        row = row + row @ weighed
    return row.squeeze(1)


def head_relevance(model: Classifier, features: Tensor, chosen: Tensor, read: Tensor) -> Tensor:
    """Relevance 1 of a class's logit, brought to the tokens that the head reads.

    Args:
        features: ``[B, T, C]``; chosen: ``[B]`` class indices; read: how much of each token is pooled ``[T]``.

    Returns:
        ``[B, T, C]``.
    """
    if (
        getattr(model.module, "head_dist", None) is not None
    ):  # one linear layer of both tokens, its halves averaged
        weights = torch.stack([model.module.head.weight[chosen], model.module.head_dist.weight[chosen]], dim=1) / 2
        positive = (features[:, :2] * weights).relu()
        shares = quotient(positive, positive.sum(dim=(1, 2), keepdim=True))
        return F.pad(shares, (0, 0, 0, features.shape[1] - 2))
    pooled = (features * read.view(-1, 1)).sum(dim=1)
    norm = getattr(model.module, "fc_norm", None) or nn.Identity()
    positive = (norm(pooled) * model.module.head.weight[chosen]).relu()
    relevance = quotient(positive, positive.sum(dim=1, keepdim=True))
    return features * read.view(-1, 1) * quotient(relevance, pooled).unsqueeze(1)


def block_relevance(
    model: Classifier, block: nn.Module, at: dict[str, Tensor], relevance: Tensor, *, last: bool = False
) -> tuple[Tensor, Tensor]:
    """Relevance of a block's attention ``[B, heads, T, T]``, and of its input ``[B, T, C]``, given its output's.

    Norms, activation, softmax and layer scale hand relevance on as it is; ``last`` stops at the attention.

    Args:
        at: what passed the block's points, in one forward pass.
    """

    def weight(path: str) -> Tensor:
        return block.get_parameter(f"{path}.weight")

    kept, branch = through_sum(at["middle"], at["mlp_added"], relevance)
    branch = through_linear(at["mlp_hidden"], weight("mlp.fc2"), branch)
    relevance = kept + through_linear(at["mlp_input"], weight("mlp.fc1"), branch)

    kept, branch = through_sum(at["block_input"], at["attention_added"], relevance)
    branch = through_linear(at["mixed"], weight("attn.proj"), branch)
    queries, keys, values = split_heads(model, at["qkv"])
    of_mixed = branch.unflatten(2, (values.shape[1], -1)).transpose(1, 2)
    of_attention, of_values = through_product(at["attention"], values, of_mixed)
    if last:
        return of_attention, relevance
    norms = [block.attn.get_submodule(name) for name in ("q_norm", "k_norm")]
    of_queries, of_keys = through_product(norms[0](queries), norms[1](keys).transpose(-2, -1), of_attention)
    of_qkv = torch.stack([of_queries, of_keys.transpose(-2, -1), of_values], dim=2)  # [B, heads, 3, T, d]
    of_qkv = of_qkv.permute(0, 3, 2, 1, 4).flatten(2)
    return of_attention, kept + through_linear(at["normed"], weight("attn.qkv"), of_qkv)


def through_linear(inputs: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a linear layer's inputs by their positive products with the weights; the bias takes none."""
    above, weight_above = inputs.clamp(min=0), weight.clamp(min=0)
    below, weight_below = inputs.clamp(max=0), weight.clamp(max=0)
    share = quotient(relevance, F.linear(above, weight_above) + F.linear(below, weight_below))
    return above * (share @ weight_above) + below * (share @ weight_below)


def through_product(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both operands of a matrix product, in proportion to their terms; half to each operand."""
    share = quotient(relevance, left @ right) / 2
    return left * (share @ right.transpose(-2, -1)), right * (left.transpose(-2, -1) @ share)


def through_sum(one: Tensor, other: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both terms of a residual sum, scaled so that the totals share it by magnitude (eq. 9).

    The totals are those of an image, over its tokens and channels.
    """
    share = quotient(relevance, one + other)
    terms = (one * share, other * share)
    totals = [term.sum(dim=(1, 2), keepdim=True) for term in terms]
    magnitude = totals[0].abs() + totals[1].abs()
    whole = relevance.sum(dim=(1, 2), keepdim=True)
    scaled = [
        term * quotient(quotient(total.abs(), magnitude) * whole, total)
        for term, total in zip(terms, totals, strict=True)
    ]
    return scaled[0], scaled[1]
