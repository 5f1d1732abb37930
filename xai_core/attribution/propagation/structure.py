"""Whether a network consists of layers that have a rule and of linear operations: read from its own graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xai_core.attribution.propagation.layers import is_attention, is_gated_mlp
from xai_core.models import Classifier

# Names of autograd's nodes, less "Backward0". Homogeneous in the activations: gradient times input adds up.
_SIMPLE_NAMES = """
AccumulateGrad Add Sub Neg Mean Sum View UnsafeView ReshapeAlias Permute Transpose T Expand Slice Select Unbind Cat
Stack Split SplitWithSizes Unsqueeze Squeeze Clone ToCopy Alias AsStrided ConstantPadNd Roll Flip Index
AvgPool2D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D MaxPool2DWithIndices AdaptiveMaxPool2D Amax Relu
UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D
NativeBatchNorm CudnnBatchNorm MiopenBatchNorm BatchNorm _Substituted _LinearRule
"""
_SIMPLE = frozenset(_SIMPLE_NAMES.split())
# The same where only one factor, the numerator, depends on the image.
_PRODUCTS = frozenset(["Mul", "Div"])
_WORDS = {
    "Mul": "a product of two activations",
    "Div": "a quotient of two activations",
    "Bmm": "a matrix product of two activations",
    "Softmax": "a softmax",
    "Sigmoid": "a sigmoid",
    "Convolution": "a convolution that changes its weights first",
    "Addmm": "a linear map outside of layers",
}


def zennit_installed(_model: Classifier, _options: Any) -> str | None:
    """The package zennit, whose rules are used."""
    try:
        import zennit  # noqa: F401
    except ImportError:
        return "it needs the package zennit, which is not installed"
    return None


class StructureCheck:
    """Names what a network computes beside ruled layers and linear operations, once for each network.

    Args:
        rules: the block of rules for a module, as it will be used.
    """

    def __init__(self, rules: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        self._rules = rules
        self._known: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()

    def foreign(self, model: Classifier, *, attention: bool) -> tuple[str, ...]:
        """What has no rule, in words; empty where everything has."""
        if model.module not in self._known:
            self._known[model.module] = tuple(sorted(set(self._operations(model, attention))))
        return self._known[model.module]

    def _operations(self, model: Classifier, attention: bool) -> Iterator[str]:
        logits = self._traced(model, attention)
        waiting, seen = [logits.grad_fn], {logits.grad_fn}
        while waiting:
            node = waiting.pop()
            following = [(one is not None) for one, _ in node.next_functions]
            yield from _foreign(node, following)
            for one, _ in node.next_functions:
                if one is not None and one not in seen:
                    seen.add(one)
                    waiting.append(one)

    def _traced(self, model: Classifier, attention: bool) -> Tensor:
        """Logits of one blank image with their graph; attention, ruled as a whole, is one step in it."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(model.device.type, enabled=False))
            stack.enter_context(self._rules(model.module))
            for module in model.module.modules():
                if attention and (is_attention(module) or is_gated_mlp(module)):
                    stack.callback(module.register_forward_hook(_as_one_step).remove)
            blank = torch.zeros(1, 3, *model.input_size, device=model.device, dtype=model.dtype)
            return model(blank.requires_grad_(True))


def _as_one_step(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach() + 0 * inputs[0].sum()


def _foreign(node: Any, following: list[bool]) -> Iterator[str]:
    name = re.sub(r"^torch::autograd::|Backward\d*(_\w+)?$", "", node.name())
    constant_right = len(following) < 2 or not following[1]
    one_factor = sum(following) < 2 and (name != "Div" or constant_right)
    if name not in _SIMPLE and not (name in _PRODUCTS and one_factor):
        yield _WORDS.get(name, name)
