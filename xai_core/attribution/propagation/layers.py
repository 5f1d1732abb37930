"""Which layers the propagation rules know, told by what their ``forward`` computes."""

from __future__ import annotations

import copy
import importlib
from functools import cache
from typing import Any

from torch import nn

# Functions of one number with f(0) = 0, all of whose relevance goes to their input. ReLU is not among them: its
# own gradient already is y / x.
_ACTIVATIONS = ["ReLU6", "Hardtanh", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Tanh"]
_ACTIVATIONS += ["Hardswish", "Softsign"]
_TIMM_ACTIVATIONS = ("Swish", "Mish", "Tanh", "HardSwish", "GELU", "GELUTanh", "QuickGELU", "HardMish", "PReLU")
_GATES = ("Sigmoid", "Hardsigmoid")


def is_linear(module: nn.Module) -> bool:
    """A convolution or fully connected layer that applies its weights as they stand."""
    return _computes(module, _linear())


def is_batch_norm(module: nn.Module) -> bool:
    """A batch normalisation by running statistics, with nothing behind it."""
    return _computes(module, _known("torch.nn", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"))


def is_batch_norm_with_activation(module: nn.Module) -> bool:
    """timm's batch normalisation that holds its activation (and, before it, its ``drop``) as children."""
    return _computes(module, _known("timm.layers.norm_act", "BatchNormAct2d"))


def is_activation(module: nn.Module) -> bool:
    """An elementwise function that keeps 0, ReLU aside."""
    return type(module) in _activations()


def is_gate(module: nn.Module) -> bool:
    """A function into (0, 1), whose output multiplies a signal."""
    return type(module) in _gates()


def norm_dim(module: nn.Module) -> tuple[int, bool] | None:
    """The dimension that a layer or RMS norm runs over and whether it subtracts the mean; None for others."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return None
    norms = "timm.layers.norm"
    if _computes(module, _known("torch.nn", "LayerNorm") | _known(norms, "LayerNorm", "LayerNormFp32")):
        return -1, True
    if _computes(module, _known(norms, "LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d")):
        return 1, True
    if _computes(module, _known(norms, "RmsNorm", "RmsNormFp32")):
        return -1, False
    return None


def is_attention(module: nn.Module) -> bool:
    """Softmax self-attention whose queries, keys and values are one layer's output, each norm in it known.

    timm's plain attention without a gate, and Swin's attention inside windows.
    """
    known = _known("timm.models.vision_transformer", "Attention") | _known(
        "timm.models.swin_transformer", "WindowAttention"
    )
    if not _computes(module, known) or getattr(module, "gate", None) is not None:
        return False
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm")]
    return all(norm is None or isinstance(norm, nn.Identity) or norm_dim(norm) is not None for norm in norms)


def is_gated_mlp(module: nn.Module) -> bool:
    """A perceptron whose hidden layer is the product of two halves, one activated (GLU, SwiGLU)."""
    return _computes(module, _known("timm.layers.mlp", "GluMlp", "SwiGLU")) and is_activation(module.act)


def dense_convolutions(module: nn.Module) -> set[nn.Module]:
    """Fully connected layers that are written as convolutions over the whole map (timm's VGG)."""
    containers = _known("timm.models.vgg", "ConvMlp")
    return {
        layer
        for container in module.modules()
        if _computes(container, containers)
        for layer in container.modules()
        if isinstance(layer, nn.Conv2d)
    }


def folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a linear layer that does the batch norm behind it as well; both originals stay untouched."""
    from zennit.canonizers import MergeBatchNorm

    layer, norm = _own_copy(layer), _own_copy(norm)
    if norm.weight is None:
        norm.weight = nn.Parameter(norm.running_var.new_ones(norm.num_features), requires_grad=False)
        norm.bias = nn.Parameter(norm.running_var.new_zeros(norm.num_features), requires_grad=False)
    MergeBatchNorm.merge_batch_norm([layer], norm)
    return layer


def _own_copy(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._parameters = {
        name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    twin._buffers = {
        name: None if value is None else value.detach().clone() for name, value in module._buffers.items()
    }
    return twin


def _computes(module: nn.Module, forwards: frozenset[Any]) -> bool:
    """Whether the module's ``forward`` is one of these; a subclass that computes something else is not."""
    return type(module).forward in forwards


@cache
def _known(home: str, *names: str) -> frozenset[Any]:
    """The ``forward`` of classes of a module; timm's versions do not all have all of them."""
    found = importlib.import_module(home)
    return frozenset(getattr(found, name).forward for name in names if hasattr(found, name))


@cache
def _linear() -> frozenset[Any]:
    return (
        _known("torch.nn", "Conv1d", "Conv2d", "Conv3d", "Linear")
        | _known("timm.layers.linear", "Linear")
        | _known("timm.layers.conv2d_same", "Conv2dSame")
    )


@cache
def _activations() -> frozenset[type]:
    found = importlib.import_module("timm.layers.activations")
    variants = importlib.import_module("timm.layers.activations_me")
    return frozenset(
        [getattr(nn, name) for name in _ACTIVATIONS]
        + [getattr(found, name) for name in _TIMM_ACTIVATIONS if hasattr(found, name)]
        + [getattr(variants, f"{name}Me") for name in _TIMM_ACTIVATIONS if hasattr(variants, f"{name}Me")]
    )


@cache
def _gates() -> frozenset[type]:
    found = importlib.import_module("timm.layers.activations")
    variants = importlib.import_module("timm.layers.activations_me")
    return frozenset(
        [getattr(nn, name) for name in _GATES]
        + [getattr(found, name) for name in ("Sigmoid", "HardSigmoid") if hasattr(found, name)]
        + [variants.HardSigmoidMe]
    )
