"""Average and maximum sensitivity of a map to small changes of its image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.robustness.noise import (
    Neighbours,
    NoiseOptions,
    distance,
    explain_neighbours,
    maps_again,
    shapeless,
)
from xai_core.registry import metrics

UNDEFINED = (
    "null where the map is zero or not finite, where a noisy copy's is not finite, and where the prediction flips "
    "on every noisy copy"
)


@dataclass(frozen=True)
class SensitivityOptions(NoiseOptions):
    """As for all noise, and ``radius``: how far a value moves at most, in the model's normalised input."""

    radius: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radius > 0:
            raise UsageError(f"radius: expected a number > 0, got {self.radius}")


def uniform(normal: Tensor) -> Tensor:
    """Uniform numbers in [-1, 1] of the same rank as the standard normal ones they come from."""
    return torch.erf(normal / math.sqrt(2))


@metrics.register(
    "avg_sensitivity",
    options=SensitivityOptions,
    paper="Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations; the mean: Bhatt et al. 2020, "
    "Evaluating and Aggregating Feature-based Model Explanations",
    family="robustness",
    needs=("explainer",),
    definition="mean over noisy copies x' of |phi(x') - phi(x)| / |phi(x)|, Euclidean norms of the maps as they "
    "are; x' = x + noise, uniform in [-radius, radius] for every value of the model's normalised input, not "
    "clamped; copies with another top 1 are left out",
    higher_is_better=False,
    bounds=(0.0, None),
    unit="share of the map's norm",
    undefined=UNDEFINED,
    cost="samples x (forward + explanation), shared with max_sensitivity",
)
def avg_sensitivity(evidence: Evidence, options: SensitivityOptions) -> Measured:
    """Average sensitivity: the mean relative change of the map."""
    neighbours, change = _relative_change(evidence, options)
    return Measured(neighbours.mean(change), {**shapeless(evidence), **neighbours.undefined})


@metrics.register(
    "max_sensitivity",
    options=SensitivityOptions,
    paper="Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations",
    family="robustness",
    needs=("explainer",),
    definition="max over noisy copies x' of |phi(x') - phi(x)| / |phi(x)|, all as in avg_sensitivity",
    higher_is_better=False,
    bounds=(0.0, None),
    unit="share of the map's norm",
    undefined=UNDEFINED,
    cost="samples x (forward + explanation), shared with avg_sensitivity",
)
def max_sensitivity(evidence: Evidence, options: SensitivityOptions) -> Measured:
    """Maximum sensitivity: the largest relative change of the map."""
    neighbours, change = _relative_change(evidence, options)
    return Measured(neighbours.highest(change), {**shapeless(evidence), **neighbours.undefined})


def _relative_change(evidence: Evidence, options: SensitivityOptions) -> tuple[Neighbours, Tensor]:
    """The noisy copies, and by how much of its norm each one's map differs, ``[B, samples]``."""

    def read(copies: Tensor, owner: Tensor) -> Tensor:
        return distance(maps_again(evidence, copies, owner), evidence.maps[owner]).unsqueeze(1)

    def compute() -> Neighbours:
        return explain_neighbours(
            evidence, options, lambda images, noise: images + options.radius * uniform(noise), read, width=1
        )

    neighbours = evidence.once(("maps in a ball", options), compute)
    norm = evidence.maps.double().flatten(1).norm(dim=1, keepdim=True)
    return neighbours, neighbours.values.squeeze(2) / norm
