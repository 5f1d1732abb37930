"""What is found out about a network once, by a pass, and remembered for as long as the network stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xai_core.models import Classifier
from xai_core.precision import own_modes

T = TypeVar("T")


def once_per_model(probe: Callable[[Classifier], T]) -> Callable[[Classifier], T]:
    """Remembers what a probe found about a network for as long as it keeps its modules' types and input size.

    The probe runs with gradients enabled, in float32 and independent of the caller's modes.
    """
    known: WeakKeyDictionary[nn.Module, tuple[object, T]] = WeakKeyDictionary()

    @wraps(probe)
    def remembered(model: Classifier) -> T:
        make = (model.input_size, model.device, *(type(module) for module in model.module.modules()))
        before = known.get(model.module)
        if before is not None and before[0] == make:
            return before[1]
        with own_modes("fp32", model.device), torch.enable_grad():
            found = probe(model)
        known[model.module] = (make, found)
        return found

    return cast("Callable[[Classifier], T]", remembered)


def probe_image(model: Classifier) -> Tensor:
    """One picture of noise at the model's input size, as a leaf of the graph."""
    noise = torch.randn(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    return noise.to(model.device, model.dtype).requires_grad_(True)
