"""Which operations lie between a classifier's input and its logits, read off autograd's graph.

The graph shows what a network really computes: a ReLU called as a function as well as one that is a module, a
product of two activations as well as a softmax. Nothing is decided by the names of modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image

# Affine whatever their arguments: sums, means, paddings and every change of layout.
LINEAR = frozenset(
    (
        *("AccumulateGrad", "Add", "Sub", "Rsub", "Neg", "Mean", "Sum", "NativeDropout"),
        *("AvgPool2D", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "UpsampleBilinear2D", "UpsampleNearest2D"),
        *("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "Flip", "Roll", "PixelShuffle"),
        *("PixelUnshuffle", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Clone", "Copy", "ToCopy"),
        *("Expand", "Repeat"),
        *("Permute", "Transpose", "T", "Squeeze", "Unsqueeze", "Cat", "Stack", "Unbind"),
        *("Slice", "Select", "Split", "SplitWithSizes", "Index"),
    )
)
# Affine in the one argument that depends on the image; products of two activations otherwise.
BILINEAR = frozenset(("Mul", "Mm", "Bmm", "Baddbmm", "Addmm", "Addmv", "Mv", "Linear", "Convolution", "Dot"))
BATCH_NORMALISATION = frozenset(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"))
NORMALISATION = frozenset(("layer normalisation", "group normalisation"))
# Functions of one activation, element by element.
ELEMENTWISE = frozenset(
    (
        *("ReLU", "GELU", "SiLU", "sigmoid", "tanh", "Hardtanh", "LeakyRelu", "PreluKernel", "Elu", "Celu"),
        *("Mish", "LogSigmoid", "Softplus", "Hardswish", "Hardsigmoid"),
    )
)
MAX_POOLING = "max pooling"
PRODUCT = "products of activations (gates or attention)"

_WORDS = {
    "Relu": "ReLU",
    "Gelu": "GELU",
    "Silu": "SiLU",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "NativeLayerNorm": "layer normalisation",
    "NativeGroupNorm": "group normalisation",
    "Softmax": "softmax",
    "MaxPool2DWithIndices": MAX_POOLING,
    "MkldnnMaxPool2D": MAX_POOLING,
}


def graph_nodes(output: Tensor) -> list[Any]:
    """All nodes of the autograd graph that made ``output``, each once."""
    seen: dict[Any, None] = {}
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        waiting += [earlier for earlier, _ in node.next_functions]
    return list(seen)


def node_name(node: Any) -> str:
    """What autograd calls the operation behind a node, without "Backward"."""
    return re.sub(r"Backward\w*$", "", node.name().split("::")[-1])


def operation(node: Any) -> str | None:
    """What a node computes, in words where there are some; None where it is affine in the image.

    ReLU6, and any clamp from 0, counts as ReLU.
    """
    name = node_name(node)
    active = [earlier is not None for earlier, _ in node.next_functions]
    if name in LINEAR:
        return None
    if name in BILINEAR or name == "Div":
        return None if sum(active) == 1 and (name != "Div" or active[0]) else PRODUCT
    if name in BATCH_NORMALISATION:
        return "batch normalisation by the batch" if getattr(node, "_saved_training", False) else None
    if name == "Hardtanh" and node._saved_min_val == 0:
        return "ReLU"
    if name.startswith("ScaledDotProduct"):
        return "attention"
    return _WORDS.get(name, name)


def is_relu(node: Any) -> bool:
    """Whether a node is a ReLU, or one with an upper bound (ReLU6)."""
    return operation(node) == "ReLU"


def nonlinear_operations(output: Tensor) -> set[str]:
    """The operations in the graph of ``output`` that are not affine in the image."""
    found = {operation(node) for node in graph_nodes(output)}
    return {name for name in found if name is not None}


def listed(names: Iterable[str]) -> str:
    """Names as a phrase, sorted."""
    return ", ".join(sorted(names))


@once_per_model
def operations_of(model: Classifier) -> set[str]:
    """The operations of a classifier that are not affine in the image, found by one forward pass."""
    return nonlinear_operations(model(probe_image(model)))
