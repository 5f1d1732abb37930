"""Arithmetic precision and autograd modes, as contexts that leave the process as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def precision_context(precision: Precision, device: str | torch.device) -> Iterator[None]:
    """Runs the block in ``fp32``, in ``tf32`` matrix products, or under ``bf16`` autocast.

    Weights stay in float32 throughout. On a device without TF32 units ``tf32`` computes float32.
    """
    before = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def own_modes(precision: Precision, device: str | torch.device) -> Iterator[None]:
    """A block whose results depend on none of the caller's modes: gradient, inference, autocast, matmul precision.

    Gradients are off inside; what needs them says so with ``torch.enable_grad()``.
    """
    with torch.inference_mode(False), torch.no_grad(), precision_context(precision, device):
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A block of arithmetic between passes that an autocast around it does not round."""
    with torch.autocast(device.type, enabled=False):
        yield
