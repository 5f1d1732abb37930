"""Hooks on the layers of a network for the time of a block, the weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(module: nn.Module, put_on: Callable[[nn.Module], Iterable[Any]]) -> Iterator[None]:
    """Hooks that ``put_on`` puts on each layer, by their handles; activations write into no input meanwhile."""
    with ExitStack() as stack:
        for child in module.modules():
            # A hook must see a layer's input as it was.
            if getattr(child, "inplace", False) is True:
                child.inplace = False
                stack.callback(setattr, child, "inplace", True)
            for handle in put_on(child):
                stack.callback(handle.remove)
        yield
