"""Randomness that can be taken up again at any step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator

# Each use of chance has numbers of its own.
_PURPOSES = {"epoch": 1, "step": 2}


def stream(seed: int, purpose: str, number: int) -> Generator:
    """A generator on the CPU for one epoch's order or one step: its state need not be kept, only the number."""
    words = np.random.SeedSequence([seed, _PURPOSES[purpose], number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
