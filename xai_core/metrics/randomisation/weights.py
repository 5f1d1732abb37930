"""Cascading randomisation of a model's weights, from the head to the stem (Adebayo et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import count

import torch
from torch import nn

from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image


@once_per_model
def layers_from_head(model: Classifier) -> tuple[str, ...]:
    """Names of the modules with parameters of their own, the one that runs last first.

    A module that runs more than once stands where it runs last; one that is not called itself, since the module
    around it uses its parameters, stands where that one is called. The order of definition would do for most
    networks, but some define late what runs early.
    """
    modules = dict(model.module.named_modules())
    clock = count()
    called: dict[nn.Module, int] = {}

    def note(module: nn.Module, _inputs: object) -> None:
        called[module] = next(clock)

    handles = [module.register_forward_pre_hook(note) for module in modules.values()]
    try:
        model(probe_image(model))
    finally:
        for handle in handles:
            handle.remove()

    def moment(name: str) -> int:
        while modules[name] not in called:
            name = name.rpartition(".")[0]
        return called[modules[name]]

    own = [name for name, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    return tuple(sorted(own, key=moment, reverse=True))


def randomised_copies(
    model: Classifier, fractions: Sequence[float], seed: int
) -> Iterator[tuple[float, Classifier]]:
    """A copy of a model with more and more of its layers re-initialised, from the head down.

    There is one copy, which is changed from step to step; the model itself is not.

    Args:
        fractions: which share of the layers is re-initialised at each step, ascending; of all that round to the
            same number of layers there is one step, and at least one layer is re-initialised.

    Yields:
        The share that was re-initialised exactly, and the copy.
    """
    names = layers_from_head(model)
    copied = Classifier(deepcopy(model.module), model.spec)
    # A seed of its own for each layer: what one draws depends neither on the others nor on the steps.
    seeds = torch.randint(2**62, (len(names),), generator=torch.Generator().manual_seed(seed)).tolist()
    done = 0
    for upto in sorted({max(1, round(fraction * len(names))) for fraction in fractions}):
        for name, own_seed in zip(names[done:upto], seeds[done:upto], strict=True):
            reinitialise(copied.module.get_submodule(name), own_seed)
        # Some timm modules keep what they computed from their weights until their mode is set.
        copied.module.eval()
        done = upto
        yield done / len(names), copied


@torch.no_grad()
def reinitialise(layer: nn.Module, seed: int) -> None:
    """Draws a layer's own parameters anew, by the same numbers on every device; the global seed stays.

    By the layer's ``reset_parameters()``, which sets running statistics back as well. Bare parameters of a module
    without it (class tokens, position embeddings, scales) are drawn from the normal distribution of their own mean
    and standard deviation: their scale stays, their content goes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if hasattr(layer, "reset_parameters"):
            device = next(layer.parameters(recurse=False)).device
            layer.cpu().reset_parameters()
            layer.to(device)
            return
        for parameter in layer.parameters(recurse=False):
            drawn = torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device)
            parameter.copy_(parameter.mean() + parameter.std(correction=0) * drawn)
