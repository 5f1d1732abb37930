"""Explanations that can themselves be differentiated by the images: what attacks on explanations follow.

Images that require gradients say that this is wanted. :func:`~xai_core.attribution.attribute` cuts them off from
their graph; a method's own function does not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xai_core.attribution.gradients.interception import (
    Interception,
    Rule,
    interceptions,
    unary,
)

# Functions of two or three straight pieces: their second derivative is 0 wherever there is one.
RECTIFIERS = ("relu", "relu6", "hardtanh", "leaky_relu")
# What is not affine in networks that rules of backward passes fit; max pooling is affine where its winner stays.
CURVED = (*RECTIFIERS, "layer_norm", "group_norm")

# What went into a function in a plain pass, and what came out, with their graph.
Call = tuple[Tensor, Tensor]


def graph_start(images: Tensor) -> Tensor:
    """Where a pass's graph begins: at images that require gradients, or else at a leaf of its own."""
    return images if images.requires_grad else images.detach().requires_grad_(True)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, computed once more when it is differentiated: nothing inside it is held until then.

    For one pass of many, whose graphs would not fit in memory together. Where no input requires a gradient it is
    the plain call.
    """
    if not any(one.requires_grad for one in inputs):
        return function(*inputs)
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        # A backward pass may run in a thread of its own, where the caller's interceptions are unknown.
        ctx.function, ctx.interceptions = function, interceptions()
        ctx.save_for_backward(*inputs)
        return function(*(one.detach() for one in inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, later: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:]
        inputs = [one.detach().requires_grad_(need) for one, need in zip(ctx.saved_tensors, asked, strict=True)]
        with torch.enable_grad(), ExitStack() as stack:
            for interception in ctx.interceptions:
                stack.enter_context(interception)
            output = ctx.function(*inputs)
        wanted = [one for one in inputs if one.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, later, allow_unused=True))
        return None, *(next(gradients) if need else None for need in asked)


def plain_calls(model: Callable[[Tensor], Tensor], images: Tensor) -> list[Call]:
    """The calls of curved functions in a plain pass of the images, in their order."""
    record: list[Call] = []

    def kept(function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        output = unary(function, rest, named)(values)
        if not values.requires_grad:
            return output
        record.append((values, output))
        # A copy: the network may write into it in place.
        return output.clone()

    with Interception(dict.fromkeys(CURVED, kept)):
        model(images)
    return record


def linked(record: list[Call], watch: Callable[[Tensor], object] | None = None) -> Interception:
    """For a pass whose backward follows a rule of its own: derivatives of curved functions are the plain pass's.

    The rule changes which derivatives the graph of its pass gives. How those of a curved function depend on the
    images is therefore left to the graph of the plain pass, which no rule has touched.

    Args:
        record: of :func:`plain_calls` on the same images; watch: is shown each rectifier's output.
    """
    plain = iter(record)

    def call(function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        if not values.requires_grad:
            return unary(function, rest, named)(values)
        output = _Linked.apply(values, next(plain))
        if watch is not None and function.__name__ in RECTIFIERS:
            watch(output)
        return output

    return Interception(dict.fromkeys(CURVED, call))


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, call: Call) -> Tensor:
        # No inputs of this step: nothing of the rule's pass leads to the plain one but the derivatives themselves.
        ctx.call = call
        return call[1].detach().clone()

    @staticmethod
    def backward(ctx: Any, later: Tensor) -> tuple[Tensor, None]:
        inner, outer = ctx.call
        (gradient,) = torch.autograd.grad(
            outer, inner, later, retain_graph=True, create_graph=torch.is_grad_enabled()
        )
        return gradient, None
