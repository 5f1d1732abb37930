"""Sharing ratios of pointwise feature vectors in gradient form (iERF equations 3, 17-21).

Relevance R_j of a feature vector v_j before an activation is shared among the vectors x_i behind the activations
that came before, in proportion to <v_ij, v_j> / |v_j|^2, where v_ij is what x_i alone puts into v_j. With
g_j = v_j R_j / |v_j|^2 that is R_i = <x_i, sum_j J_ji^T g_j>: an activation whose backward turns the gradient G of
its output x into v <x, G> / |v|^2 makes plain autograd carry g through everything affine in between. What biases
put in is shared equally by the vectors of their receptive field that are not zero, so that ratios add up to 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xai_core.arithmetic import ratio, wide
from xai_core.attribution.propagation.gradient_form import frozen_scale_norm
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


@contextmanager
def sharing_ratio_rules(module: nn.Module) -> Iterator[None]:
    """Forward passes inside the block record graphs whose gradients G share relevance by sharing ratios.

    The inner product of a feature vector with its gradient is the vector's relevance, where the backward pass
    started at feature vectors v of relevance R with v R / |v|^2 (:func:`start_at`).
    """
    with hooked(module, _Hooks().put_on):
        yield


def start_at(vectors: Tensor, relevance: Tensor, dim: int = 1) -> Tensor:
    """The gradient with which feature vectors (channels along ``dim``) of some relevance start a backward pass.

    Args:
        vectors: ``[..., C, ...]``; relevance: the same without ``dim``. A zero vector starts nothing.
    """
    vectors = wide(vectors)
    return ratio(vectors * relevance.unsqueeze(dim), vectors.square().sum(dim, keepdim=True))


class _Hooks:
    """The forward hooks of every kind of layer; knows along which dimension the last layer left its channels."""

    def __init__(self) -> None:
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
            # A gate is a factor, as an activation's slope is: relevance goes to what it lets through.
            yield module.register_forward_hook(lambda _, inputs, output: output.detach())
        elif (over := norm_dim(module)) is not None:
            yield module.register_forward_hook(self._frozen_norm(*over))

    def _activation(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _Activation.apply(inputs[0], output.detach(), self._dim)

    def _linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._dim = -1 if isinstance(layer, nn.Linear) else 1
        bias = _Bias(layer)
        shared = _SharedBias.apply(inputs[0], output, bias)
        setattr(shared, _BIAS, bias)
        return shared

    def _norm(self, norm: nn.Module, source: Tensor, output: Tensor) -> Tensor:
        self._dim = 1
        return _ShiftOfNorm.apply(source, output, _shift(norm), getattr(source, _BIAS, None), 1)

    def _norm_with_activation(self, module: nn.Module) -> Iterator[Any]:
        entered: list[Tensor] = []

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entered.append(inputs[0])

        yield module.register_forward_pre_hook(enter)
        yield module.drop.register_forward_hook(lambda _, __, output: self._norm(module, entered.pop(), output))

    def _frozen_norm(self, dim: int, centred: bool) -> Any:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._dim = dim
            with torch.autocast(output.device.type, enabled=False):
                frozen = frozen_scale_norm(norm, inputs[0], output, dim, centred=centred)
            bias = getattr(norm, "bias", None)
            return frozen if bias is None else _ShiftOfNorm.apply(inputs[0], frozen, bias, None, dim)

        return hook


def _shift(norm: Any) -> Tensor:
    """What a batch normalisation by running statistics adds, ``[C]``."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    return (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale


class _Bias:
    """The bias of one call of a layer: what relevance it takes, and how the layer's inputs share it."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        #: Relevance of the shift of the norm behind the layer, ``[B, h, w]``: its backward has run by then.
        self.of_norm: Tensor | None = None

    def shares(self, source: Tensor, gradient: Tensor) -> Tensor | None:
        """What the bias adds to the gradient of the layer's inputs; None where nothing is added."""
        dim = -1 if isinstance(self._layer, nn.Linear) else 1
        relevance, self.of_norm = self.of_norm, None
        own = self._layer.bias
        if own is not None:
            taken = _inner(gradient, own, dim)
            relevance = taken if relevance is None else relevance + taken
        if relevance is None:
            return None
        source = wide(source)
        length = source.square().sum(dim, keepdim=True)
        if dim == -1:
            return ratio(source * relevance.unsqueeze(dim), length)
        return ratio(source * self._spread(relevance.unsqueeze(1), (length > 0).to(relevance.dtype)), length)

    def _spread(self, relevance: Tensor, live: Tensor) -> Tensor:
        """Relevance ``[B, 1, h', w']`` of outputs, in equal shares to the live inputs that they see."""
        box = _box_of(self._layer, relevance)
        with torch.enable_grad():
            seen = live.requires_grad_(True)
            counts = box.forward(seen)
        (spread,) = torch.autograd.grad(counts, seen, ratio(relevance, counts.detach()))
        return spread * live.detach()


def _box_of(layer: nn.Module, like: Tensor) -> Any:
    """A convolution of the same geometry that adds up one channel."""
    box: Any = copy.copy(layer)
    box._parameters = {"weight": like.new_ones(1, 1, *box.kernel_size), "bias": None}
    box.groups = 1
    return box


def _inner(gradient: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Inner products of a gradient with a vector ``[C]`` that is the same everywhere, without ``dim``."""
    shape = [1] * gradient.ndim
    shape[dim] = -1
    return (gradient * shift.view(shape)).sum(dim)


# Each hands a layer's output on as it is: marked as changed in place, it costs neither a copy nor a view.


class _Activation(Function):
    """The output of an elementwise function; backwards, the relevance of its output starts anew at its input."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, dim: int) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(source, output)
        ctx.dim = dim
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        source, output = ctx.saved_tensors
        with torch.autocast(source.device.type, enabled=False):
            relevance = (wide(output) * wide(gradient)).sum(ctx.dim)
            return start_at(source, relevance, ctx.dim).to(source.dtype), None, None


class _SharedBias(Function):
    """A layer's output as it is; backwards, its inputs share what its bias takes."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, bias: _Bias) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(source)
        ctx.bias = bias
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (source,) = ctx.saved_tensors
        with torch.autocast(source.device.type, enabled=False):
            added = ctx.bias.shares(source, wide(gradient))
        return None if added is None else added.to(source.dtype), gradient, None


class _ShiftOfNorm(Function):
    """A norm's output as it is; backwards, its shift's part goes to the layer before it, or to its own input."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, shift: Tensor, bias: _Bias | None, dim: int) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(source, shift)
        ctx.bias, ctx.dim = bias, dim
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        source, shift = ctx.saved_tensors
        with torch.autocast(source.device.type, enabled=False):
            relevance = _inner(wide(gradient), shift, ctx.dim)
            if ctx.bias is not None:
                ctx.bias.of_norm = relevance
                return None, gradient, None, None, None
            added = start_at(source, relevance, ctx.dim)
        return added.to(source.dtype), gradient, None, None, None
