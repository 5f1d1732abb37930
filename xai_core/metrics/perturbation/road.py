"""ROAD: remove pixels and fill the gap so that the mask itself tells nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.perturbation.curves import NULL_PIXELS, mean_drop
from xai_core.metrics.perturbation.linear_imputation import impute
from xai_core.metrics.trajectory import Curve
from xai_core.registry import metrics, refuse_unread, variant_id

Order = Literal["most", "least", "combined"]

#: How the mean drops along removal from either end make up a value, so that higher is better in every order.
SHARES: dict[Order, dict[Order, float]] = {
    "most": {"most": 1.0},
    "least": {"least": -1.0},
    "combined": {"most": 0.5, "least": -0.5},
}


@dataclass(frozen=True)
class RoadOptions:
    """``order``: which pixels go first, or both; ``percentages`` of the pixels are removed.

    ``noise`` is the standard deviation of what is added to filled pixels, for pictures in [0, 1]; ``seed`` draws
    it.
    """

    order: Order = "combined"
    percentages: tuple[float, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    noise: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentages", tuple(self.percentages))
        if self.order not in SHARES:
            raise UsageError(f"order: expected {', '.join(get_args(Order))}, got {self.order!r}")
        rising = all(one < other for one, other in itertools.pairwise((0, *self.percentages, 100)))
        if not self.percentages or not rising:
            raise UsageError(
                f"percentages: expected rising numbers between 0 and 100, got {list(self.percentages)}"
            )
        if not self.noise >= 0:
            raise UsageError(f"noise: expected a standard deviation of at least 0, got {self.noise}")
        if self.noise == 0:
            refuse_unread(self, "without noise", "seed")


@metrics.register(
    "road",
    options=RoadOptions,
    paper="Rong et al. 2022, ROAD",
    family="perturbation",
    definition="mean over the percentages q of p(x) - p(x_q), p the target's probability, where floor(q / 100 * "
    "pixels) pixels are removed, most relevant first (order most); of p(x_q) - p(x), least relevant first (order "
    "least); half the sum of both, (LeRF - MoRF) / 2 (order combined). A removed pixel becomes the mean of its "
    "eight neighbours, direct ones weighted 1/6 and diagonal ones 1/12, removed ones at their own filled value, "
    "plus Gaussian noise that is the same for all images and percentages",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="probability",
    undefined=NULL_PIXELS,
    cost="percentages, twice as many where combined",
)
def road(evidence: Evidence, options: RoadOptions) -> Measured:
    """ROAD: change of the target's probability while pixels are removed and imputed from their neighbours."""
    value = torch.zeros_like(evidence.clean)
    for order, share in SHARES[options.order].items():
        curve = removal_curve(evidence, replace(options, order=order))
        value = value + share * mean_drop(curve, absolute=False)
    return Measured(value, evidence.unranked("pixels"))


def removal_curve(evidence: Evidence, options: RoadOptions) -> Curve:
    """The target's probability while pixels are removed from one end of the ranking; recorded under its id.

    Fractions are the options' percentages behind a 0 for the image as it is: ``[B, len(percentages) + 1]``.
    """

    def followed() -> Curve:
        curve = _follow(evidence, options)
        name = variant_id(f"road_{options.order}", replace(options, order=RoadOptions.order))
        evidence.record(name, curve, evidence.unranked("pixels"))
        return curve

    return evidence.once(("road", options), followed)


def _follow(evidence: Evidence, options: RoadOptions) -> Curve:
    images, device = evidence.images, evidence.images.device
    pixels = evidence.maps[0].numel()
    removed = torch.tensor([int(pixels * one / 100) for one in options.percentages], device=device)
    position = evidence.ranking("pixels").position
    depth = position if options.order == "most" else pixels - 1 - position
    noise = _noise(evidence, options)
    owner = torch.arange(len(images), device=device).repeat_interleave(len(removed))
    step = torch.arange(len(removed), device=device).repeat(len(images))

    def build(rows: slice) -> Tensor:
        gone = depth[owner[rows]] < removed[step[rows]].view(-1, 1, 1)
        return impute(images[owner[rows]], gone) + gone.unsqueeze(1) * noise

    prob = evidence.probability(build, owner).view(len(images), len(removed))
    fraction = torch.cat([removed.new_zeros(1), removed]).double() / pixels
    return Curve(fraction.expand(len(images), -1), torch.cat([evidence.clean.view(-1, 1), prob], dim=1))


def _noise(evidence: Evidence, options: RoadOptions) -> Tensor:
    """One picture of noise for all images, ``[1, 3, H, W]`` in the model's input space."""
    generator = torch.Generator().manual_seed(options.seed)
    drawn = options.noise * torch.randn(evidence.images.shape[1:], generator=generator)
    picture = drawn.unsqueeze(0).to(evidence.images)
    return evidence.model.normalise(picture) - evidence.model.normalise(torch.zeros_like(picture))
