"""SaCo: does salience order and size agree with the effect of groups of pixels?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.parts.labels import MOST_PARTS, mean_inside_parts
from xai_core.registry import metrics


@dataclass(frozen=True)
class SaCoOptions:
    """``groups`` K: into how many groups of equal size the ranked pixels are cut."""

    groups: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.groups <= MOST_PARTS:
            raise UsageError(f"groups: expected a number from 2 to {MOST_PARTS}, got {self.groups}")


@metrics.register(
    "saco",
    options=SaCoOptions,
    paper="Wu et al. 2024, On the Faithfulness of Vision Transformer Explanations, algorithm 1",
    family="perturbation",
    definition="pixels are ranked by the signed map and cut into K groups, equal in size up to one pixel; s is a "
    "group's mean of the map, e = p(x) - p(x with the group replaced by the image's mean pixel); over the pairs "
    "i < j of groups, i ranked higher, the sum of s_i - s_j, negated where e_i < e_j, divided by the sum of "
    "|s_i - s_j|",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="coefficient",
    undefined="null where the map is constant or not finite, or where all groups have the same effect",
    cost="K",
)
def saco(evidence: Evidence, options: SaCoOptions) -> Measured:
    """Salience-guided faithfulness coefficient: differences in salience, signed by whether effects agree."""
    group = salience_groups(evidence, options.groups)
    salience = mean_inside_parts(evidence.maps, group)
    effect = group_effects(evidence, group, options.groups)
    reasons = {
        **evidence.unranked("pixels"),
        # Every comparison would count as agreement, whatever the map.
        "all groups have the same effect": (effect == effect[:, :1]).all(dim=1),
    }
    return Measured(coefficient(salience, effect), reasons)


def salience_groups(evidence: Evidence, count: int) -> Tensor:
    """Which group every pixel is in, the most salient in 0: ``[B, H, W]``.

    Raises:
        UsageError: the image has fewer pixels than groups are asked for.
    """
    size = evidence.maps[0].numel()
    if count > size:
        raise UsageError(f"groups: expected at most the image's {size} pixels, got {count}")
    return evidence.ranking("pixels").position * count // size


def group_effects(evidence: Evidence, group: Tensor, count: int) -> Tensor:
    """How far the target's probability falls when a group is replaced by the mean pixel: ``[B, K]`` float64."""
    images, device = evidence.images, evidence.images.device
    mean_pixel = images.mean(dim=(2, 3), keepdim=True)
    owner = torch.arange(len(images), device=device).repeat_interleave(count)
    chosen = torch.arange(count, device=device).repeat(len(images))

    def build(rows: slice) -> Tensor:
        some = owner[rows]
        replaced = (group[some] == chosen[rows].view(-1, 1, 1)).unsqueeze(1)
        return torch.where(replaced, mean_pixel[some], images[some])

    return evidence.clean.view(-1, 1) - evidence.probability(build, owner).view(len(images), count)


def coefficient(salience: Tensor, effect: Tensor) -> Tensor:
    """The coefficient of groups by falling salience, both ``[B, K]``: ``[B]``; NaN where an effect is."""
    higher, lower = torch.combinations(torch.arange(salience.shape[1], device=salience.device)).unbind(dim=1)
    difference = salience[:, higher] - salience[:, lower]
    agrees = effect[:, higher] >= effect[:, lower]
    value = torch.where(agrees, difference, -difference).sum(dim=1) / difference.abs().sum(dim=1)
    # A comparison with NaN is false, not unknown.
    return torch.where(effect.isnan().any(dim=1), torch.nan, value)
