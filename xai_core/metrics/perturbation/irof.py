"""IROF: how fast removing whole parts takes the model's answer away."""

from __future__ import annotations

from dataclasses import dataclass

from xai_core.baselines import BaselineKind
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.perturbation.curves import NULL_PARTS, PartCurveOptions, area, part_deletion
from xai_core.metrics.trajectory import Curve
from xai_core.registry import metrics


@dataclass(frozen=True)
class IrofOptions(PartCurveOptions):
    """As for part curves, but a removed part becomes the data set's mean colour: 0 after normalisation."""

    baseline: BaselineKind = "mean"


@metrics.register(
    "irof",
    options=IrofOptions,
    paper="Rieger & Hansen 2020, IROF",
    family="perturbation",
    needs=("parts",),
    definition="1 - area under p(x_k) / p(x), p the target's probability, while whole parts are replaced by the "
    "baseline, highest score first, one a step; x-axis: fraction of parts, trapezoid with both ends k = 0..K; a "
    "pixel map scores a part by its mean inside it; pixels outside all parts go with the last; no clamp, so a "
    "target that rises above its clean probability counts against the map",
    higher_is_better=True,
    bounds=(None, 1.0),
    unit="share of the clean probability",
    undefined=f"{NULL_PARTS}; null where the clean probability is 0",
    cost="K",
)
def irof(evidence: Evidence, options: IrofOptions) -> Measured:
    """IROF: area over the curve of the target's relative probability along part deletion."""
    curve = evidence.curve(part_deletion(options))
    share = Curve(curve.fraction, curve.prob / evidence.clean.view(-1, 1))
    reasons = {**evidence.unranked("parts"), "the clean probability is 0": evidence.clean == 0}
    return Measured(1.0 - area(share), reasons)
