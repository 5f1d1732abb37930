"""Attribution methods, a folder a family and a file an idea; importing this package registers them all."""

# One method belongs to networks that explain themselves, and lives with them.
from xai_core import inherent
from xai_core.attribution import (
    attention,
    cam,
    concept_methods,
    gradients,
    kl_hessian,
    learned,
    perturbation,
    propagation,
    var,
)
from xai_core.attribution.fitting import FitSamples, fit_method
from xai_core.attribution.interface import (
    MapsWithArrays,
    PartScores,
    attribute,
    attribute_arrays,
    attribute_classes,
    join_scores,
    paint_parts,
    score_parts,
    upsample_map,
)

__all__ = [
    "FitSamples",
    "MapsWithArrays",
    "PartScores",
    "attention",
    "attribute",
    "attribute_arrays",
    "attribute_classes",
    "cam",
    "concept_methods",
    "fit_method",
    "gradients",
    "inherent",
    "join_scores",
    "kl_hessian",
    "learned",
    "paint_parts",
    "perturbation",
    "propagation",
    "score_parts",
    "upsample_map",
    "var",
]
