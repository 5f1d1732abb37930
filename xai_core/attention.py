"""Explicit attention: timm's fused kernels switched off module by module, and restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def explicit_attention(module: nn.Module) -> Iterator[None]:
    """Computes attention step by step inside the block, so that second derivatives exist.

    Fused attention kernels have no second derivative. Only this module's flags change, not the process's.
    """
    fused = [child for child in module.modules() if getattr(child, "fused_attn", False)]
    for child in fused:
        child.fused_attn = False
    try:
        yield
    finally:
        for child in fused:
            child.fused_attn = True
