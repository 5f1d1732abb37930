"""Rollout: attention of all blocks multiplied up, half of every token staying where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attention import patch_map, pooled_head, probed, readout, softmax_attention
from xai_core.attribution.attention.flow import carry_back
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.registry import methods

HEAD_FUSIONS = ("mean", "max", "min")


@dataclass(frozen=True)
class AttentionRolloutOptions:
    """``head_fusion``: mean, max or min over heads; ``discard_ratio``: share of least entries cut, by block."""

    head_fusion: str = "mean"
    discard_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.head_fusion not in HEAD_FUSIONS:
            raise UsageError(
                f"attention_rollout.head_fusion: expected one of {', '.join(HEAD_FUSIONS)}, "
                f"got {self.head_fusion!r}"
            )
        _check_ratio("attention_rollout", self.discard_ratio)


@dataclass(frozen=True)
class GradRolloutOptions:
    """``discard_ratio``: share of least entries cut, by block; vit-explain's default is 0.9."""

    discard_ratio: float = 0.9

    def __post_init__(self) -> None:
        _check_ratio("grad_rollout", self.discard_ratio)


@methods.register(
    "attention_rollout",
    options=AttentionRolloutOptions,
    paper="Abnar & Zuidema 2020, Quantifying Attention Flow in Transformers",
    equation="1",
    families=("vit",),
    needs=(softmax_attention, pooled_head),
    upsampling="bilinear",
    cost="1 forward",
    class_specific=False,
    gradient_free=True,
    fused_attention="off",
)
def attention_rollout(
    model: Classifier, images: Tensor, classes: Tensor, options: AttentionRolloutOptions, batch_size: int
) -> Tensor:
    """Attention rollout: the product over blocks of attention and identity by halves, as the head reads it."""

    def fuse(attention: Tensor) -> Tensor:
        return _stay_by_halves(_fuse_heads(wide(attention), options.head_fusion), options.discard_ratio)

    with probed(model, ["attention"], reduce={"attention": fuse}) as found:
        model(images)
    with full_precision(images.device):
        tokens = carry_back(wide(readout(model))[None], reversed(found["attention"]))
    return patch_map(model, tokens).expand(-1, classes.shape[1], -1, -1)


@methods.register(
    "grad_rollout",
    options=GradRolloutOptions,
    paper="Gildenblat 2020, vit-explain (github.com/jacobgil/vit-explain), after Abnar & Zuidema 2020",
    equation="gradient attention rollout",
    families=("vit",),
    needs=(softmax_attention, pooled_head),
    upsampling="bilinear",
    cost="1 forward + 1 gradient a class",
    fused_attention="off",
)
def grad_rollout(
    model: Classifier, images: Tensor, classes: Tensor, options: GradRolloutOptions, batch_size: int
) -> Tensor:
    """Gradient attention rollout: rollout of each block's attention times the gradient of the class's logit."""
    read = wide(readout(model))[None]
    with torch.enable_grad(), probed(model, ["attention"], with_gradient=True) as found:
        logits = model(images)
    attentions = found["attention"]

    def roll(gradients: Sequence[Tensor]) -> Tensor:
        def weighted() -> Iterator[Tensor]:
            for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
                useful = (wide(attention.detach()) * wide(gradient)).mean(dim=1).relu()
                yield _stay_by_halves(useful, options.discard_ratio)

        with full_precision(images.device):
            return patch_map(model, carry_back(read, weighted()).squeeze(1))

    return per_class(logits, classes, attentions, roll)


def _fuse_heads(attention: Tensor, how: str) -> Tensor:
    if how == "mean":
        return attention.mean(dim=1)
    return attention.amax(dim=1) if how == "max" else attention.amin(dim=1)


def _stay_by_halves(matrix: Tensor, discard_ratio: float) -> Tensor:
    """``0.5 M + 0.5 I`` with rows adding to 1, after the least entries of each ``[T, T]`` have been cut."""
    kept = _discard_least(matrix, discard_ratio)
    joined = kept + torch.eye(kept.shape[-1], device=kept.device, dtype=kept.dtype)
    return joined / joined.sum(dim=-1, keepdim=True)


def _discard_least(matrix: Tensor, ratio: float) -> Tensor:
    """The matrices without the given share of their entries, and without those equal to the largest of these."""
    entries = matrix.flatten(1)
    count = int(entries.shape[1] * ratio)
    if count == 0:
        return matrix
    limit = entries.kthvalue(count, dim=1).values
    return matrix * (matrix > limit[:, None, None])


def _check_ratio(method: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise UsageError(f"{method}.discard_ratio: expected at least 0 and below 1, got {ratio}")
