"""Randomisation checks: the map of a model should not look like that of a model that learnt nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xai_core.attribution.interface import misfit
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.randomisation.similarity import SIMILARITIES, SIMILARITY_NAMES, SimilarityName
from xai_core.metrics.randomisation.weights import randomised_copies
from xai_core.metrics.shapeless import constant, not_finite
from xai_core.metrics.trajectory import Curve
from xai_core.models import Classifier, load_classifier
from xai_core.registry import changed, metrics, refuse_unread, variant_id

Test = Literal["weights", "labels", "class"]

_UNREAD: dict[Test, tuple[str, ...]] = {
    "weights": ("checkpoint",),
    "labels": ("fractions", "seed"),
    "class": ("fractions", "checkpoint"),
}


@dataclass(frozen=True)
class RandomisationOptions:
    """What the map is compared with, and how.

    ``test``: ``weights`` (the model with its weights re-initialised from the head down), ``labels`` (the same
    architecture trained on shuffled labels, whose safetensors file is ``checkpoint``) or ``class`` (the same model
    asked for another class). ``similarity``: spearman, pearson, cosine or ssim; with ``absolute`` of the maps'
    magnitudes. ``fractions``: after which shares of the layers ``weights`` compares, ascending. ``seed``: of the
    new weights, or of the other class.
    """

    test: Test = "weights"
    similarity: SimilarityName = "spearman"
    absolute: bool = False
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        _refuse_other("test", self.test, get_args(Test))
        _refuse_other("similarity", self.similarity, SIMILARITY_NAMES)
        shares = (0.0, *self.fractions)
        if len(shares) < 2 or any(not a < b <= 1 for a, b in zip(shares, self.fractions, strict=False)):
            raise UsageError(
                f"randomisation.fractions: expected ascending numbers in (0, 1], got {list(self.fractions)}"
            )
        refuse_unread(self, f"with test {self.test}", *_UNREAD[self.test])
        if self.test == "labels" and self.checkpoint is None:
            raise UsageError(
                "randomisation.checkpoint: expected with test labels the safetensors file of the same "
                "architecture trained on shuffled labels, got none"
            )

    def in_id(self) -> dict[str, Any]:
        """What stands in the id: what is off its default; a file by its name, without its folder."""
        shown = changed(self)
        if self.checkpoint is not None:
            shown["checkpoint"] = Path(self.checkpoint).name
        return shown


def _refuse_other(option: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise UsageError(f"randomisation.{option}: expected one of {', '.join(known)}, got {got!r}")


@metrics.register(
    "randomisation",
    options=RandomisationOptions,
    paper="Adebayo et al. 2018, Sanity Checks for Saliency Maps: cascading model parameter randomisation "
    "(weights), data randomisation (labels); Sixt et al. 2020, When Explanations Lie: random logit (class)",
    family="sanity",
    definition="similarity of the map and the method's map of the same image and class after the layers were "
    "re-initialised on a copy, from the head to the stem; the value is that at the largest fraction, by default "
    "of all layers, the others stand on the curve. labels: of a model trained on shuffled labels; class: of class "
    "(target + k) mod C, k in 1..C-1 drawn once by the seed. spearman: ties share their mean rank; cosine: "
    "without centring; ssim: 7 x 7 uniform windows, each map scaled to [0, 1] by its own minimum and maximum; "
    "absolute: magnitudes are compared. What a method learnt from data stays that of the true model",
    higher_is_better=False,
    bounds=(-1.0, 1.0),
    unit="similarity",
    undefined="null where one of the two maps is constant or not finite, or the method refuses the other model",
    needs=("explainer",),
    cost="1 explanation for each fraction; 1 for labels and class",
)
def randomisation(evidence: Evidence, options: RandomisationOptions) -> Measured:
    """Randomisation check: similarity to the map of a model without what was learnt (lower notices more)."""
    return _CHECKS[options.test](evidence, options)


def _weights(evidence: Evidence, options: RandomisationOptions) -> Measured:
    steps = evidence.once(
        ("randomised weights", options.fractions, options.seed),
        lambda: [
            (fraction, _explained(evidence, model))
            for fraction, model in randomised_copies(evidence.model, options.fractions, options.seed)
        ],
    )
    measured = [_compared(evidence, maps, "the randomised model", options) for _, maps in steps]
    # Without a randomised layer the map is what it is.
    similarity = [torch.ones_like(measured[0].value)]
    similarity += [torch.where(one.defined, one.value, torch.nan) for one in measured]
    fraction = similarity[0].new_tensor([0.0, *(fraction for fraction, _ in steps)])
    curve = Curve(fraction.expand(len(evidence), -1), torch.stack(similarity, dim=1))
    evidence.record(variant_id("randomisation", options), curve, _own_reasons(evidence.maps, options))
    return measured[-1]


def _labels(evidence: Evidence, options: RandomisationOptions) -> Measured:
    maps = evidence.once(
        ("shuffled labels", options.checkpoint),
        lambda: _explained(evidence, _trained_on_shuffled_labels(evidence.model, options)),
    )
    return _compared(evidence, maps, "the model of shuffled labels", options)


def _trained_on_shuffled_labels(model: Classifier, options: RandomisationOptions) -> Classifier:
    try:
        spec = replace(model.spec, checkpoint=options.checkpoint, pretrained=False)
        loaded = load_classifier(spec, model.device)
    except UsageError as error:
        raise UsageError(f"randomisation.checkpoint: cannot be used: {error}") from error
    loaded.module.to(model.dtype)
    return loaded


def _class(evidence: Evidence, options: RandomisationOptions) -> Measured:
    classes = evidence.model.num_classes
    if classes < 2:
        raise UsageError(
            "randomisation.test: expected a model of two or more classes for test class, got one class"
        )
    generator = torch.Generator().manual_seed(options.seed)
    # One step for all images: what an image is compared with does not depend on its neighbours.
    step = int(torch.randint(1, classes, (), generator=generator))
    maps = evidence.once(
        ("another class", step),
        lambda: _explained(evidence, evidence.model, (evidence.targets + step) % classes),
    )
    return _compared(evidence, maps, "the other class", options)


_CHECKS: dict[Test, Callable[[Evidence, RandomisationOptions], Measured]] = {
    "weights": _weights,
    "labels": _labels,
    "class": _class,
}


def _explained(evidence: Evidence, model: Classifier, classes: Tensor | None = None) -> Tensor | None:
    """The method's maps ``[B, H, W]`` of another model or class; None where it refuses the model."""
    explainer = evidence.method
    if misfit(explainer.entry, model, explainer.chosen) is not None:
        return None
    targets = evidence.targets if classes is None else classes
    return explainer.maps(model, evidence.images, targets, evidence.parts)


def _compared(evidence: Evidence, others: Tensor | None, whose: str, options: RandomisationOptions) -> Measured:
    """The similarity of the maps and others; where one of the two says nothing there is none."""
    reasons = _own_reasons(evidence.maps, options)
    if others is None:
        refused = torch.ones(len(evidence), dtype=torch.bool, device=evidence.images.device)
        nothing = torch.full(refused.shape, torch.nan, dtype=torch.float64, device=refused.device)
        return Measured(nothing, {**reasons, f"the method refuses {whose}": refused})
    maps, others = _of_interest(evidence.maps, options), _of_interest(others, options)
    reasons |= {**not_finite(others, f"the map of {whose}"), **constant(others, f"the map of {whose}")}
    similarity = SIMILARITIES[options.similarity]
    values = run_batches(lambda rows: similarity(maps[rows], others[rows]), len(evidence), evidence.batch_size)
    return Measured(torch.cat(values), reasons)


def _own_reasons(maps: Tensor, options: RandomisationOptions) -> dict[str, Tensor]:
    maps = _of_interest(maps, options)
    return {**not_finite(maps), **constant(maps)}


def _of_interest(maps: Tensor, options: RandomisationOptions) -> Tensor:
    return maps.abs() if options.absolute else maps
