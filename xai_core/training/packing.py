"""A training's state as one flat mapping of tensors: prefixes for its parts, bytes for what is text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, without its graph."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with names below a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def as_tensor(text: str) -> Tensor:
    """Text as its bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def as_text(tensor: Tensor) -> str:
    """The text that :func:`as_tensor` took."""
    return bytes(tensor.tolist()).decode(errors="replace")
