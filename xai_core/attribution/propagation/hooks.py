"""Putting the rules on a network: hooks for the time of a block, the weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.attribution.propagation.gradient_form import (
    Held,
    frozen_scale_norm,
    identity_rule,
    linear_rule,
    scaled_gradient,
)
from xai_core.attribution.propagation.hooked import hooked
from xai_core.attribution.propagation.layers import (
    folded,
    is_activation,
    is_attention,
    is_batch_norm,
    is_batch_norm_with_activation,
    is_gate,
    is_gated_mlp,
    is_linear,
    norm_dim,
)

# Given a linear layer and its input: the zennit rule for it, or None for its plain gradient (LRP-0).
ChooseRule = Callable[[nn.Module, Tensor], Any]

# What a rule holds constant of a layer's input and output; None where the layer is to be left as it is.
Hold = Callable[[Tensor, Tensor], Held | None]

# Under which name a linear layer's output remembers the layer and its input, for a batch normalisation behind it.
_ORIGIN = "_vitrine_origin"


def numbers(source: Tensor, output: Tensor) -> Held:
    """The input and the output as they are in the pass, without their graph."""
    return Held(source.detach(), output.detach())


@contextmanager
def propagation_rules(
    module: nn.Module, choose: ChooseRule, *, attention: bool = False, hold: Hold = numbers
) -> Iterator[None]:
    """Forward passes inside the block record graphs whose gradients are relevance divided by activation.

    The backward passes may come later and as often as wanted. A gradient taken from the logit of a class times an
    activation is the relevance of that activation; any other scalar may be the start as well.

    Args:
        choose: the rule of each linear layer; a batch normalisation right behind one is folded into it.
        attention: whether self-attention and gated perceptrons share relevance by AttnLRP's uniform rule.
        hold: called for every ruled layer of a pass, in their order.
    """
    with hooked(module, partial(_Hooks(choose, hold).put_on, attention=attention)):
        yield


class _Hooks:
    """The forward hooks of every kind of layer; holds the folded layers of one block."""

    def __init__(self, choose: ChooseRule, hold: Hold) -> None:
        self._choose = choose
        self._hold = hold
        self._folded: dict[tuple[nn.Module, nn.Module], nn.Module] = {}

    def put_on(self, module: nn.Module, *, attention: bool) -> Iterator[Any]:
        if is_linear(module):
            yield module.register_forward_hook(self._linear)
        elif is_batch_norm(module):
            yield module.register_forward_hook(lambda norm, inputs, output: self._norm(norm, inputs[0], output))
        elif is_batch_norm_with_activation(module):
            yield from self._norm_with_activation(module)
        elif is_activation(module):
            yield module.register_forward_hook(self._activation)
        elif is_gate(module):
            yield module.register_forward_hook(self._gate)
        elif (over := norm_dim(module)) is not None:
            yield module.register_forward_hook(partial(self._frozen_scale, *over))
        elif attention and is_attention(module):
            yield module.qkv.register_forward_hook(lambda _, inputs, output: _uniform_attention(output))
        elif attention and is_gated_mlp(module):
            yield module.drop1.register_forward_pre_hook(lambda _, inputs: scaled_gradient(inputs[0], 0.5))

    def _linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        source = inputs[0]
        rule = self._choose(layer, source)
        if rule is None or not output.requires_grad:
            return None
        result = self._ruled(partial(linear_rule, rule, layer), source, output)
        setattr(result, _ORIGIN, (layer, source))
        return result

    def _norm(self, norm: nn.Module, source: Tensor, output: Tensor) -> Tensor | None:
        """The layer before and the norm as one linear layer; alone, the plain gradient of its affine map."""
        layer, start = getattr(source, _ORIGIN, (None, None))
        if layer is None or start is None:
            return None
        pair = layer, norm
        if pair not in self._folded:
            self._folded[pair] = folded(layer, norm)
        return self._ruled(partial(linear_rule, self._choose(layer, start), self._folded[pair]), start, output)

    def _norm_with_activation(self, module: nn.Module) -> Iterator[Any]:
        entered: list[Tensor] = []

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entered.append(inputs[0])

        def normalised(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return self._norm(module, entered.pop(), output)

        yield module.register_forward_pre_hook(enter)
        yield module.drop.register_forward_hook(normalised)

    def _activation(self, function: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A function that something softens need not keep 0.
        zero = 0.0 if self._hold is numbers else function.forward(torch.zeros_like(inputs[0]))
        return self._ruled(partial(identity_rule, zero=zero), inputs[0], output)

    def _gate(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._ruled(lambda _source, held: held.y, inputs[0], output)

    def _frozen_scale(
        self, dim: int, centred: bool, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        def rule(source: Tensor, held: Held) -> Tensor:
            return frozen_scale_norm(norm, source, held.y, dim, centred=centred, held=held.x)

        return self._ruled(rule, inputs[0], output)

    def _ruled(self, rule: Callable[[Tensor, Held], Tensor], source: Tensor, output: Tensor) -> Tensor:
        """The output under a rule, outside of autocast, which would narrow what it divides by."""
        held = self._hold(source, output)
        if held is None:
            # A copy: what follows may write into it in place, and the output may be kept.
            return output.clone()
        with torch.autocast(source.device.type, enabled=False):
            return rule(source, held)


def _uniform_attention(qkv: Tensor) -> Tensor:
    """Each of the two matrix products halves what its factors get: values by 2, queries and keys twice by 2."""
    width = qkv.shape[-1] // 3
    share = torch.cat([qkv.new_full((2 * width,), 0.25), qkv.new_full((width,), 0.5)])
    return scaled_gradient(qkv, share)
