"""Relevance in gradient form: under these rules plain autograd yields relevance divided by activation.

Where g = R / x stands for the relevance R of an activation x, everything between the ruled layers that is linear
(residual sums, concatenation, average pooling, slices, per-channel scales) needs no rule: a sum a + b hands g on
to both, so that they get the relevance g * a and g * b, in proportion to what they put in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from xai_core.arithmetic import ratio, wide


class Held(NamedTuple):
    """A layer's input and output as a rule reads them: numbers, to which no relevance flows.

    Where the relevance itself shall be differentiated they have the graph of a pass without rules.
    """

    x: Tensor
    y: Tensor


def linear_rule(rule: Any, layer: nn.Module, source: Tensor, held: Held) -> Tensor:
    """The output of a linear layer, with a gradient to ``source`` that follows one of zennit's rules.

    Args:
        rule: a zennit ``BasicHook``, read as data: its modifiers, its gradient mapper and its reducer.
        layer: what the rule recomputes, with changed weights, in every backward pass.
    """
    return _LinearRule.apply(source, *held, layer, rule)


def substituted(surrogate: Tensor, value: Tensor) -> Tensor:
    """``value`` with the gradient of ``surrogate``."""
    return _Substituted.apply(surrogate.to(value.dtype), value.detach())


def identity_rule(source: Tensor, held: Held, zero: Tensor | float = 0.0) -> Tensor:
    """The output of an elementwise function, all its relevance going to ``source``: gradient y / x, 0 at x = 0.

    Args:
        zero: what the function gives for 0, which y is counted from.
    """
    factor = ratio(wide(held.y) - zero, wide(held.x))
    return substituted(source * factor.to(source.dtype), held.y)


def scaled_gradient(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """The tensor, with its gradient times ``factor``."""
    return substituted(tensor * factor, tensor)


def frozen_scale_norm(
    norm: nn.Module, source: Tensor, output: Tensor, dim: int, *, centred: bool, held: Tensor | None = None
) -> Tensor:
    """``output`` of a layer or RMS normalisation, differentiated with its standard deviation as a constant.

    Args:
        dim: the normalised dimension; ``centred``: whether the mean is subtracted.
        held: the input of which the standard deviation is taken; ``source`` as a number by default.
    """
    x, constant = (
        one - one.mean(dim, keepdim=True) if centred else one
        for one in (wide(source), wide(source.detach() if held is None else held))
    )
    surrogate = x * (constant.square().mean(dim, keepdim=True) + norm.eps).rsqrt()
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
    def forward(ctx: Any, source: Tensor, x: Tensor, y: Tensor, layer: nn.Module, rule: Any) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.layer, ctx.rule = layer, rule
        ctx.set_materialize_grads(False)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        x, y = ctx.saved_tensors
        # Rules divide: under autocast they run in the weights' type, which is the wider.
        wider = ctx.layer.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            result = _through(ctx.rule, ctx.layer, Held(x.to(wider), y.to(wider)), gradient.to(wider))
        return result.to(x.dtype), None, None, None, None


def _through(rule: Any, layer: nn.Module, held: Held, gradient: Tensor) -> Tensor:
    """The relevance of a layer's input divided by that input, from that of its output divided by the output."""
    from zennit.core import ParamMod
    from zennit.rules import Epsilon

    # Gradients are on in a backward pass that is itself to be differentiated.
    twice = torch.is_grad_enabled() and held.x.requires_grad
    inputs, outputs = [], []
    for change_input, change_weights, change_output in zip(
        rule.input_modifiers, rule.param_modifiers, rule.output_modifiers, strict=True
    ):
        changed = change_input(held.x)
        changed = changed if twice else changed.detach().requires_grad_(True)
        with ParamMod.ensure(change_weights)(layer), torch.enable_grad():
            outputs.append(change_output(layer.forward(changed)))
        inputs.append(changed)
    # The epsilon rule divides by the output: near 0 two roundings of one output would have any quotient.
    relevance = gradient * (outputs[0] if isinstance(rule, Epsilon) else held.y)
    gradients = torch.autograd.grad(outputs, inputs, rule.gradient_mapper(relevance, outputs), create_graph=twice)
    # The reducer is linear in the changed inputs, so dividing these first divides its result: no small divisor.
    # What is left of them is 0 or 1, whose derivative is 0.
    return rule.reducer([ratio(changed, held.x).detach() for changed in inputs], gradients)
