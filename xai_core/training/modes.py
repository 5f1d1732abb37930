"""The modes in which a training computes: its own whatever the caller's are, and the same twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xai_core.precision import Precision, own_modes


@contextmanager
def training_modes(precision: Precision, device: torch.device) -> Iterator[None]:
    """A block without gradients, in a precision, that comes out the same every time; for steps and for measuring.

    Autocast keeps bfloat16 copies of weights until the outermost such block is left; here it keeps none, since the
    weights move meanwhile.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        with own_modes(precision, device), _same_sums(device):
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextmanager
def _same_sums(device: torch.device) -> Iterator[None]:
    """A GPU's kernels add up in the same order every time, where there are such kernels."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = kernels
