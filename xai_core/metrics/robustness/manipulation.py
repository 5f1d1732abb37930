"""Adversarial manipulation: can a map be changed while the model's answer stays?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.attribution.differentiable import NoSecondDerivative
from xai_core.metrics.correlation import pearson
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.robustness.attack import Attack, AttackOptions, partners
from xai_core.metrics.shapeless import constant, not_finite
from xai_core.metrics.structural_similarity import structural_similarity, unit_range
from xai_core.registry import metrics

PAPER = "iERF IV-B3, eq. 7; Dombrowski et al. 2019, Explanations can be manipulated and geometry is to blame"
ATTACK = (
    "the attack moves the image by Adam down lambda1 |p(x') - p(x_t)|^2 + lambda2 |F(x') - F(x)|^2, Euclidean "
    "norms: p is the map's absolute value over its sum, F the logits, x_t the shard's next image (cyclic) with "
    "another target class, each explained for its own target; it ends before the step that would take the mean "
    "squared change of the normalised input beyond mse, or after max_steps; a channel stays within bound/255 and "
    "a valid picture; to differentiate p(x') the network has softplus for ReLU; F and the compared maps are the "
    "true network's"
)
UNDEFINED = (
    "null where the method cannot be differentiated, the absolute map before or after is constant or not finite, "
    "no other image of the shard has another class, the map's derivative is zero or not finite, or the attack "
    "flips the prediction"
)
COST = "up to max_steps x (the explanation, 3 to 6 times its cost to differentiate it, 1 forward + 1 gradient)"


@dataclass(frozen=True)
class Manipulated:
    """What the attack made of all images: their maps ``[B, H, W]``, and why there is none."""

    maps: Tensor
    undefined: dict[str, Tensor]


def manipulated(evidence: Evidence, options: AttackOptions) -> Manipulated:
    """The true method's maps of the attacked images, computed once."""
    return evidence.once(("manipulated", options), lambda: _manipulate(evidence, options))


def _manipulate(evidence: Evidence, options: AttackOptions) -> Manipulated:
    shapeless = _shapeless(evidence.maps, "the map")
    partner = partners(evidence.targets, ~_any(shapeless))
    reasons = {**shapeless, "no other image with another class": partner < 0}
    rows = (~_any(reasons)).nonzero().flatten()
    explainer = evidence.method
    if not len(rows) or not explainer.entry.differentiable:
        return _untouched(evidence, reasons, differentiable=explainer.entry.differentiable)
    images, targets = evidence.images[rows], evidence.targets[rows]
    try:
        found = Attack(evidence.model, explainer, options).run(images, targets, evidence.maps[partner[rows]])
    except NoSecondDerivative:
        return _untouched(evidence, reasons, differentiable=False)
    moved = found.images.to(images.dtype)
    maps = evidence.maps.clone()
    maps[rows] = explainer.maps(evidence.model, moved, targets).to(maps.dtype)
    top = evidence.forward(lambda some: moved[some], rows, lambda logits, _: logits.argmax(dim=1))
    after = {
        "the map's derivative is zero": found.flat,
        "the map's derivative is not finite": found.not_finite,
        "the attack flips the prediction": top != evidence.clean_logits[rows].argmax(dim=1),
        **_shapeless(maps[rows], "the manipulated map"),
    }
    return Manipulated(maps, reasons | {why: _among(len(evidence), rows, where) for why, where in after.items()})


def _untouched(evidence: Evidence, reasons: dict[str, Tensor], *, differentiable: bool) -> Manipulated:
    whole = torch.full((len(evidence),), not differentiable, device=evidence.images.device)
    return Manipulated(evidence.maps, {"the explanation cannot be differentiated": whole, **reasons})


def _shapeless(maps: Tensor, subject: str) -> dict[str, Tensor]:
    """Why absolute maps are nothing to compare, as reasons with where they apply."""
    return {**not_finite(maps, subject), **constant(maps.abs(), subject)}


def _any(reasons: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(reasons.values())).any(dim=0)


def _among(count: int, rows: Tensor, where: Tensor) -> Tensor:
    """What is said of some rows, as said of ``count``."""
    every = where.new_zeros(count)
    every[rows] = where
    return every


@metrics.register(
    "manipulation_ssim",
    options=AttackOptions,
    paper=PAPER,
    family="robustness",
    needs=("explainer",),
    definition="SSIM (7 x 7 windows, sample covariance) of the absolute map before and after a targeted attack, "
    f"each scaled to span [0, 1]; {ATTACK}",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="similarity",
    undefined=UNDEFINED,
    cost=COST,
)
def manipulation_ssim(evidence: Evidence, options: AttackOptions) -> Measured:
    """Manipulation, SSIM: structural similarity of the map before and after an attack on it."""
    after = manipulated(evidence, options)
    before, attacked = (unit_range(maps.abs().nan_to_num()) for maps in (evidence.maps, after.maps))
    return Measured(structural_similarity(before, attacked), after.undefined)


@metrics.register(
    "manipulation_pcc",
    options=AttackOptions,
    paper=PAPER,
    family="robustness",
    needs=("explainer",),
    definition="Pearson correlation over the pixels of the absolute map before and after a targeted attack; "
    f"{ATTACK}",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="correlation",
    undefined=UNDEFINED,
    cost=COST,
)
def manipulation_pcc(evidence: Evidence, options: AttackOptions) -> Measured:
    """Manipulation, PCC: Pearson correlation of the map before and after an attack on it."""
    after = manipulated(evidence, options)
    before, attacked = (maps.abs().flatten(1) for maps in (evidence.maps, after.maps))
    return Measured(pearson(before, attacked), after.undefined)
