"""Agreement with the true effects of parts, known where a scene can be drawn again without one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.metrics.correlation import spearman
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.truth import Truth
from xai_core.parts.labels import mean_inside_parts
from xai_core.registry import NoOptions, metrics

PAPER = "Hesse et al. 2023, FunnyBirds (single deletion)"
SCORED = (
    "A true part scores the mean of the map, with its sign, over the pixels where the part is seen; its effect is "
    "the target's logit of the scene minus that of the same scene drawn without the part."
)
NOTHING_RANKED = "where the map is constant or not finite, where all effects or all scores are equal"


@dataclass(frozen=True)
class TrueParts:
    """Scores and true effects of the true parts of ``B`` images, ``[B, P]`` float64; ``seen`` says which count."""

    scores: Tensor
    effects: Tensor
    seen: Tensor

    @property
    def count(self) -> Tensor:
        """How many parts of each image count, ``[B]``."""
        return self.seen.sum(dim=1)

    def vary(self, values: Tensor) -> Tensor:
        """Where the parts that count have at least two different values, ``[B]``."""
        return _highest(values, self.seen) > -_highest(-values, self.seen)


def true_parts(evidence: Evidence) -> TrueParts:
    """The parts of each image that are seen in it and whose effect is known."""

    def collect() -> TrueParts:
        labels, effects = _known(evidence.truth)
        scores = mean_inside_parts(evidence.maps, labels)
        width = max(scores.shape[1], effects.shape[1])
        scores, effects = (
            F.pad(one, (0, width - one.shape[1]), value=torch.nan) for one in (scores, effects.double())
        )
        return TrueParts(scores, effects, ~scores.isnan() & ~effects.isnan())

    return evidence.once("true parts", collect)


def _known(truth: Truth) -> tuple[Tensor, Tensor]:
    if truth.parts is None or truth.effects is None:
        raise TypeError("a metric that reads true effects must be registered with needs=('effects',)")
    return truth.parts, truth.effects


def _highest(values: Tensor, kept: Tensor) -> Tensor:
    """The largest of the values ``[B, P]`` that are kept, -inf where none is: ``[B]``."""
    without = values.new_full((len(values), 1), -torch.inf)
    return torch.cat([torch.where(kept, values, -torch.inf), without], dim=1).amax(dim=1)


def _undefined(evidence: Evidence, parts: TrueParts, least: int, few: str) -> dict[str, Tensor]:
    return {
        # A constant map's means differ by roundings, which rank nothing.
        **evidence.unranked("pixels"),
        few: parts.count < least,
        "all true effects are equal": ~parts.vary(parts.effects),
        "all true parts score the same": ~parts.vary(parts.scores),
    }


@metrics.register(
    "true_effect_rank",
    options=NoOptions,
    paper=PAPER,
    family="truth",
    needs=("effects",),
    definition=f"Spearman's correlation, over the true parts of the scene that are seen, between their scores and "
    f"their true effects; ties share their mean rank. {SCORED}",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="correlation",
    undefined=f"null {NOTHING_RANKED}, and where fewer than three true parts are seen",
    cost="0; one for each true part, once for all methods",
)
def true_effect_rank(evidence: Evidence, options: NoOptions) -> Measured:
    """True-effect rank: do the parts' scores stand in the order of their true effects."""
    parts = true_parts(evidence)
    value = spearman(parts.scores, parts.effects, parts.seen)
    return Measured(value, _undefined(evidence, parts, 3, "fewer than three true parts are seen"))


@metrics.register(
    "true_effect_top1",
    options=NoOptions,
    paper=PAPER,
    family="truth",
    needs=("effects",),
    definition="1 where the true part with the highest score is the one with the largest true effect, else 0; "
    f"where several parts share the highest score, the share of them with the largest effect. {SCORED}",
    higher_is_better=True,
    bounds=(0.0, 1.0),
    unit="share of images",
    undefined=f"null {NOTHING_RANKED}, and where fewer than two true parts are seen",
    cost="0; one for each true part, once for all methods",
)
def true_effect_top1(evidence: Evidence, options: NoOptions) -> Measured:
    """True-effect top 1: is the part that scores highest the one that matters most."""
    parts = true_parts(evidence)
    named, right = (
        parts.seen & (values == _highest(values, parts.seen).view(-1, 1))
        for values in (parts.scores, parts.effects)
    )
    value = (named & right).sum(dim=1).double() / named.sum(dim=1).clamp(min=1)
    return Measured(value, _undefined(evidence, parts, 2, "fewer than two true parts are seen"))
