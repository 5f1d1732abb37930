"""What the machine can do at most: the measured rate of large matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import median, timed
from xai_core.precision import Precision

SIZE = {"cpu": 2048, "cuda": 8192}


def matrix_rate(device: str, precision: Precision) -> float:
    """FLOP/s of a square matrix product in this precision (call inside its ``precision_context``)."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = SIZE[device]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds = [timed(lambda: left @ right, device) for _ in range(6)][1:]
    return 2 * size**3 / median(seconds)


def flops_of(function: Callable[[], object]) -> int:
    """Floating-point operations of one call, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())
