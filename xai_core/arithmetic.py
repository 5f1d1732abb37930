"""Arithmetic between passes: wide enough, and without a division by zero."""

from __future__ import annotations

from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: autocast may leave what a pass gives in half precision."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0."""
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
