"""Complexity of a map, whatever the model: how few pixels carry it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.shapeless import not_finite, zero
from xai_core.registry import NoOptions, metrics

NULL = "null where the map is zero or not finite"


@metrics.register(
    "gini",
    paper="iERF eq. 33; Chalasani et al. 2020",
    family="complexity",
    definition="1 - 2 * sum over k of v_(k) / |v|_1 * (d - k + 0.5) / d with v = |map| in rising order, d pixels: "
    "0 where all pixels are equal, 1 - 1/d where one has everything",
    higher_is_better=True,
    unit="Gini index",
    undefined=NULL,
    cost="0",
)
def gini(evidence: Evidence, options: NoOptions) -> Measured:
    """Sparseness: the Gini index of the absolute map."""
    magnitude, undefined = magnitudes(evidence)
    size = magnitude.shape[1]
    weight = (size - torch.arange(1, size + 1, device=magnitude.device, dtype=torch.float64) + 0.5) / size
    held = (magnitude.sort(dim=1).values * weight).sum(dim=1) / magnitude.sum(dim=1)
    # Rounding can leave a map of equal pixels below 0.
    return Measured((1 - 2 * held).clamp(min=0), undefined)


@metrics.register(
    "entropy",
    paper="Bhatt et al. 2020, complexity",
    family="complexity",
    definition="-sum over pixels of p log p with p = |map| / sum of |map|, natural logarithm, 0 log 0 = 0: 0 "
    "where one pixel has everything, log d where all d pixels are equal",
    higher_is_better=False,
    bounds=(0.0, None),
    unit="nats",
    undefined=NULL,
    cost="0",
)
def entropy(evidence: Evidence, options: NoOptions) -> Measured:
    """Complexity: the Shannon entropy of the pixels' shares of the absolute map."""
    magnitude, undefined = magnitudes(evidence)
    share = magnitude / magnitude.sum(dim=1, keepdim=True)
    return Measured(torch.special.entr(share).sum(dim=1), undefined)


@dataclass(frozen=True)
class EffectiveComplexityOptions:
    """``epsilon``: the share of the map's highest magnitude that a pixel has to exceed to count."""

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise UsageError(f"epsilon: expected a number from 0 to below 1, got {self.epsilon}")


@metrics.register(
    "effective_complexity",
    options=EffectiveComplexityOptions,
    paper="Nguyen and Martinez 2020, in the form of a threshold",
    family="complexity",
    definition="share of pixels with |map| > epsilon * max |map|, each image by its own maximum",
    higher_is_better=False,
    unit="share of pixels",
    undefined=NULL,
    cost="0",
)
def effective_complexity(evidence: Evidence, options: EffectiveComplexityOptions) -> Measured:
    """Effective complexity: how many pixels are not negligible beside the map's strongest."""
    magnitude, undefined = magnitudes(evidence)
    counted = magnitude > options.epsilon * magnitude.amax(dim=1, keepdim=True)
    return Measured(counted.double().mean(dim=1), undefined)


def magnitudes(evidence: Evidence) -> tuple[Tensor, dict[str, Tensor]]:
    """The absolute maps as rows, ``[B, H W]`` float64, and why one has no complexity."""

    def computed() -> tuple[Tensor, dict[str, Tensor]]:
        magnitude = evidence.maps.flatten(1).double().abs()
        return magnitude, {**not_finite(magnitude), **zero(magnitude)}

    return evidence.once("magnitudes of the maps", computed)
