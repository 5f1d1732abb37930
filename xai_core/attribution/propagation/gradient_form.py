"""Relevance in gradient form: under these rules plain autograd yields relevance divided by activation.

Where g = R / x stands for the relevance R of an activation x, everything between the ruled layers that is linear
(residual sums, concatenation, average pooling, slices, per-channel scales) needs no rule: a sum a + b hands g on
to both, so that they get the relevance g * a and g * b, in proportion to what they put in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xai_core.arithmetic import ratio, wide


def linear_rule(rule: Any, layer: nn.Module, source: Tensor, output: Tensor) -> Tensor:
    """``output`` of a linear layer, with a gradient to ``source`` that follows one of zennit's rules.

    Args:
        rule: a zennit ``BasicHook``, read as data: its modifiers, its gradient mapper and its reducer.
        layer: what the rule recomputes, with changed weights, in every backward pass.
    """
    return _LinearRule.apply(source, output.detach(), layer, rule)


def substituted(surrogate: Tensor, value: Tensor) -> Tensor:
    """``value`` with the gradient of ``surrogate``."""
    return _Substituted.apply(surrogate.to(value.dtype), value.detach())


def identity_rule(source: Tensor, output: Tensor) -> Tensor:
    """``output`` of an elementwise function, all its relevance going to ``source``: gradient y / x, 0 at x = 0."""
    x, y = wide(source.detach()), wide(output.detach())
    return substituted(source * ratio(y, x).to(source.dtype), output)


def scaled_gradient(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """The tensor, with its gradient times ``factor``."""
    return substituted(tensor * factor, tensor)


def frozen_scale_norm(norm: nn.Module, source: Tensor, output: Tensor, dim: int, *, centred: bool) -> Tensor:
    """``output`` of a layer or RMS normalisation, differentiated with its standard deviation as a constant.

    Args:
        dim: the normalised dimension; ``centred``: whether the mean is subtracted.
    """
    x = wide(source)
    x = x - x.mean(dim, keepdim=True) if centred else x
    scale = (x.detach().square().mean(dim, keepdim=True) + norm.eps).rsqrt()
    surrogate = x * scale
    if norm.weight is not None:
        shape = [1] * x.ndim
        shape[dim] = -1
        surrogate = surrogate * norm.weight.view(shape)
    return substituted(surrogate, output)


class _Substituted(Function):
    # A copy, not a view: what follows may write into it in place.
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _LinearRule(Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, layer: nn.Module, rule: Any) -> Tensor:
        ctx.save_for_backward(source, output)
        ctx.layer, ctx.rule = layer, rule
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        source, output = ctx.saved_tensors
        # Rules divide: under autocast they run in the weights' type, which is the wider.
        wide = ctx.layer.weight.dtype
        with torch.autocast(source.device.type, enabled=False):
            result = _through(ctx.rule, ctx.layer, source.to(wide), output.to(wide), gradient.to(wide))
        return result.to(source.dtype), None, None, None


def _through(rule: Any, layer: nn.Module, source: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
    """The relevance of a layer's input divided by that input, from that of its output divided by the output."""
    from zennit.core import ParamMod
    from zennit.rules import Epsilon

    inputs, outputs = [], []
    for change_input, change_weights, change_output in zip(
        rule.input_modifiers, rule.param_modifiers, rule.output_modifiers, strict=True
    ):
        changed = change_input(source).detach().requires_grad_(True)
        with ParamMod.ensure(change_weights)(layer), torch.enable_grad():
            outputs.append(change_output(layer.forward(changed)))
        inputs.append(changed)
    # The epsilon rule divides by the output: near 0 two roundings of one output would have any quotient.
    relevance = gradient * (outputs[0].detach() if isinstance(rule, Epsilon) else output)
    gradients = torch.autograd.grad(outputs, inputs, rule.gradient_mapper(relevance, outputs))
    # The reducer is linear in the changed inputs, so dividing these first divides its result: no small divisor.
    return rule.reducer([ratio(changed.detach(), source) for changed in inputs], gradients)
