"""Rules for single torch functions inside a network's forward pass, without touching the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rule = Callable[..., Tensor]

# Activation functions of one tensor, element by element, by the name under which they are called.
ELEMENTWISE_FUNCTIONS = (
    *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "hardswish", "hardsigmoid"),
)


_threads = threading.local()


class Interception(TorchFunctionMode):
    """Hands the calls of named torch functions to rules, in this thread, for the passes inside the block.

    A rule is called with the function and its arguments and returns what the network gets instead. Modules that
    are used twice, functional calls and ``inplace`` flags are all seen here, as calls. In-place methods
    (``relu_``) are not handed over.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self._rules = rules

    def __enter__(self) -> Any:
        """Begins; the same interception may be begun again inside."""
        _threads.open = (*interceptions(), self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Ends."""
        super().__exit__(*error)
        _threads.open = interceptions()[:-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each of its functions."""
        named = kwargs or {}
        rule = self._rules.get(getattr(func, "__name__", ""))
        return func(*args, **named) if rule is None else rule(func, *args, **named)


def interceptions() -> tuple[Interception, ...]:
    """Those that are open in this thread, the outermost first."""
    return getattr(_threads, "open", ())


def unary(function: Callable[..., Tensor], rest: tuple[Any, ...], named: Mapping[str, Any]) -> Rule:
    """An activation function with its further arguments fixed, not in place."""
    fixed = {name: value for name, value in named.items() if name != "inplace"}
    return lambda values: function(values, *rest, **fixed)


def slope(function: Rule, values: Tensor) -> Tensor:
    """The derivative of an element-wise function at each value."""
    with torch.enable_grad():
        leaves = values.detach().requires_grad_(True)
        (derivative,) = torch.autograd.grad(function(leaves).sum(), leaves)
    return derivative
