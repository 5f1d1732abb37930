"""Whether a network consists of layers that have a rule and of linear operations: read from its own graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.attribution.gradients.operations import LINEAR, graph_nodes, node_name
from xai_core.attribution.propagation.layers import is_attention, is_gated_mlp
from xai_core.models import Classifier
from xai_core.per_model import once_per_model

# Homogeneous in the activations, beside what is linear: gradient times input adds up.
HOMOGENEOUS = LINEAR | frozenset(
    (
        *("Relu", "MaxPool2DWithIndices", "MkldnnMaxPool2D", "AdaptiveMaxPool2D", "Amax", "UpsampleBicubic2D"),
        *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm", "_Substituted", "_LinearRule"),
    )
)
# Affine under the rules of sharing ratios, whose activations are steps of their own.
AFFINE = LINEAR | frozenset(
    (
        *("MaxPool2DWithIndices", "MkldnnMaxPool2D", "AdaptiveMaxPool2D", "Amax", "UpsampleBicubic2D"),
        *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNorm"),
        *("_Substituted", "_Activation", "_SharedBias", "_ShiftOfNorm"),
        *("Convolution", "Addmm", "Mm", "Linear"),
    )
)
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
        attention: whether attention and gated MLPs are ruled as a whole.
        known: the operations that need no rule.
    """

    def __init__(
        self,
        rules: Callable[[nn.Module], AbstractContextManager[None]],
        *,
        attention: bool,
        known: frozenset[str] = HOMOGENEOUS,
    ) -> None:
        self._rules = rules
        self._attention = attention
        self._known = known
        #: What has no rule in a model, in words; empty where everything has.
        self.foreign = once_per_model(self._foreign)

    def _foreign(self, model: Classifier) -> tuple[str, ...]:
        nodes = graph_nodes(self._traced(model))
        return tuple(sorted({word for node in nodes for word in _foreign(node, self._known)}))

    def _traced(self, model: Classifier) -> Tensor:
        """Logits of one blank image with their graph; attention, ruled as a whole, is one step in it."""
        with ExitStack() as stack:
            stack.enter_context(self._rules(model.module))
            for module in model.module.modules():
                if self._attention and (is_attention(module) or is_gated_mlp(module)):
                    stack.callback(module.register_forward_hook(_as_one_step).remove)
            blank = torch.zeros(1, 3, *model.input_size, device=model.device, dtype=model.dtype)
            return model(blank.requires_grad_(True))


def _as_one_step(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach() + 0 * inputs[0].sum()


def _foreign(node: Any, known: frozenset[str]) -> Iterator[str]:
    name = node_name(node)
    following = [earlier is not None for earlier, _ in node.next_functions]
    constant_right = len(following) < 2 or not following[1]
    one_factor = sum(following) < 2 and (name != "Div" or constant_right)
    if name not in known and not (name in _PRODUCTS and one_factor):
        yield _WORDS.get(name, name)
