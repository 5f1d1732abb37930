"""Stability: how far a map moves against how far the image moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.robustness.noise import NoiseOptions, distance, explain_neighbours, maps_again, shapeless
from xai_core.registry import metrics


@dataclass(frozen=True)
class StabilityOptions(NoiseOptions):
    """As for all noise, and ``sigma``: its standard deviation, in the model's normalised input."""

    sigma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise UsageError(f"sigma: expected a standard deviation > 0, got {self.sigma}")


def over_peak(maps: Tensor) -> Tensor:
    """Maps ``[B, H, W]`` over their largest absolute value, so in [-1, 1], float64; a map of zeros stays."""
    peak = maps.double().abs().amax(dim=(1, 2), keepdim=True)
    return maps.double() / torch.where(peak > 0, peak, 1.0)


@metrics.register(
    "stability",
    options=StabilityOptions,
    paper="Alvarez-Melis and Jaakkola 2018, On the Robustness of Interpretability Methods; iERF eq. 34",
    family="robustness",
    needs=("explainer",),
    definition="max over noisy copies x' of |m - m'| / |x - x'|, Euclidean norms; x' = x + Gaussian noise of "
    "sigma in the model's normalised input, not clamped; m is the map over its largest absolute value, image by "
    "image, so in [-1, 1], and a map of zeros stays; copies with another top 1 are left out",
    higher_is_better=False,
    bounds=(0.0, None),
    unit="share of the map's peak per unit of normalised input",
    undefined="null where the map is zero or not finite, where a noisy copy's is not finite, and where the "
    "prediction flips on every noisy copy",
    cost="samples x (forward + explanation)",
)
def stability(evidence: Evidence, options: StabilityOptions) -> Measured:
    """Stability: the largest ratio of the map's change to the image's."""
    clean = over_peak(evidence.maps)

    def read(copies: Tensor, owner: Tensor) -> Tensor:
        maps = over_peak(maps_again(evidence, copies, owner))
        return torch.stack([distance(maps, clean[owner]), distance(copies, evidence.images[owner])], dim=1)

    neighbours = explain_neighbours(
        evidence, options, lambda images, noise: images + options.sigma * noise, read, width=2
    )
    moved, by = neighbours.values.unbind(dim=2)
    return Measured(neighbours.highest(moved / by), {**shapeless(evidence), **neighbours.undefined})
