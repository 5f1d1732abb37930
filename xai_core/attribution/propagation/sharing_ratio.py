"""Sharing ratios of pointwise feature vectors in gradient form (iERF equations 3, 17-21).

Relevance R_j of a feature vector v_j before an activation is shared among the vectors x_i behind the activations
that came before, in proportion to <v_ij, v_j> / |v_j|^2, where v_ij is what x_i alone puts into v_j. With
g_j = v_j R_j / |v_j|^2 that is R_i = <x_i, sum_j J_ji^T g_j>: an activation whose backward turns the gradient G of
its output x into v <x, G> / |v|^2 makes plain autograd carry g through everything affine in between. What biases
put in is shared equally by the vectors of their receptive field that are not zero, so that ratios add up to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from xai_core.arithmetic import wide
from xai_core.attribution.propagation.bias_shares import Bias, Squares, inner, over, start_at
from xai_core.attribution.propagation.gradient_form import Held, frozen_scale_norm
from xai_core.attribution.propagation.hooked import hooked
from xai_core.attribution.propagation.layers import (
    is_activation,
    is_batch_norm,
    is_batch_norm_with_activation,
    is_gate,
    is_linear,
    norm_dim,
)

# Under which name a layer's output remembers the share of its bias, for a batch normalisation right behind it.
_BIAS = "_vitrine_bias"


# What a rule reads of a layer's input and output, asked for every ruled layer of a pass in their order; None where
# the layer is to be left as it is.
Hold = Callable[[Tensor, Tensor], Held | None]


def of_the_pass(source: Tensor, output: Tensor) -> Held:
    """The input and the output as they are in the pass; a rule's backward reads them as numbers."""
    return Held(source.detach(), output.detach())


@contextmanager
def sharing_ratio_rules(module: nn.Module, hold: Hold = of_the_pass) -> Iterator[None]:
    """Forward passes inside the block record graphs whose gradients G share relevance by sharing ratios.

    The inner product of a feature vector with its gradient is the vector's relevance, where the backward pass
    started at feature vectors v of relevance R with v R / |v|^2 (:func:`start_at`). It can be differentiated by
    the images where ``hold`` gives what a plain pass of the same images had, with its graph.
    """
    with hooked(module, _Hooks(hold).put_on):
        yield


class _Hooks:
    """The forward hooks of every kind of layer; knows along which dimension the last layer left its channels."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._dim = 1

    def put_on(self, module: nn.Module) -> Iterator[Any]:
        if is_linear(module):
            yield module.register_forward_hook(self._linear)
        elif is_batch_norm(module):
            yield module.register_forward_hook(lambda norm, inputs, output: self._norm(norm, inputs[0], output))
        elif is_batch_norm_with_activation(module):
            yield from self._norm_with_activation(module)
        elif is_activation(module) or type(module) is nn.ReLU:
            yield module.register_forward_hook(self._activation)
        elif is_gate(module):
            yield module.register_forward_hook(self._gate)
        elif (over := norm_dim(module)) is not None:
            yield module.register_forward_hook(partial(self._frozen_norm, *over))

    def _activation(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        held = self._hold(inputs[0], output)
        if held is None:
            # A copy: what follows may write into it in place, and the output may be kept.
            return output.clone()
        return _Activation.apply(inputs[0], output.detach(), *held, self._dim)

    def _gate(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # A gate is a factor, as an activation's slope is: relevance goes to what it lets through.
        held = self._hold(inputs[0], output)
        return None if held is None else held.y

    def _linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        self._dim = -1 if isinstance(layer, nn.Linear) else 1
        held = self._hold(inputs[0], output)
        if held is None:
            return None
        bias = Bias(layer, self._dim)
        shared = _SharedBias.apply(inputs[0], output, held.x, bias)
        setattr(shared, _BIAS, bias)
        return shared

    def _norm(self, norm: nn.Module, source: Tensor, output: Tensor) -> Tensor | None:
        self._dim = 1
        held = self._hold(source, output)
        if held is None:
            return None
        return _ShiftOfNorm.apply(source, output, held.x, _shift(norm), getattr(source, _BIAS, None), 1)

    def _norm_with_activation(self, module: nn.Module) -> Iterator[Any]:
        entered: list[Tensor] = []

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entered.append(inputs[0])

        yield module.register_forward_pre_hook(enter)
        yield module.drop.register_forward_hook(lambda _, __, output: self._norm(module, entered.pop(), output))

    def _frozen_norm(
        self, dim: int, centred: bool, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        self._dim = dim
        source = inputs[0]
        held = self._hold(source, output)
        if held is None:
            return None
        with torch.autocast(output.device.type, enabled=False):
            frozen = frozen_scale_norm(norm, source, output, dim, centred=centred, held=held.x)
        bias = getattr(norm, "bias", None)
        return frozen if bias is None else _ShiftOfNorm.apply(source, frozen, held.x, bias, None, dim)


def _shift(norm: Any) -> Tensor:
    """What a batch normalisation by running statistics adds, ``[C]``."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    return (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale


# Each hands a layer's output on as it is: marked as changed in place, it costs neither a copy nor a view.


class _Activation(Function):
    """The output of an elementwise function; backwards, the relevance of its output starts anew at its input."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, y)
        ctx.squares = Squares(dim)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, y = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            relevance = (wide(y) * wide(gradient)).sum(ctx.squares.dim, keepdim=True)
            vectors = wide(x)
            found = vectors * over(relevance, ctx.squares.of(vectors))
        return found.to(x.dtype), None, None, None, None


class _SharedBias(Function):
    """A layer's output as it is; backwards, its inputs share what its bias takes."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, x: Tensor, bias: Bias) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.bias = bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            added = ctx.bias.shares(x, wide(gradient))
        return None if added is None else added.to(x.dtype), gradient, None, None


class _ShiftOfNorm(Function):
    """A norm's output as it is; backwards, its shift's part goes to the layer before it, or to its own input."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, output: Tensor, x: Tensor, shift: Tensor, bias: Bias | None, dim: int
    ) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, shift)
        ctx.bias, ctx.dim = bias, dim
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        x, shift = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            relevance = inner(wide(gradient), shift, ctx.dim)
            if ctx.bias is not None:
                ctx.bias.of_norm = relevance
                return None, gradient, None, None, None, None
            added = start_at(x, relevance, ctx.dim)
        return added.to(x.dtype), gradient, None, None, None, None


__all__ = ["sharing_ratio_rules", "start_at"]
