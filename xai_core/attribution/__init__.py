"""Attribution methods, one file an idea; importing this package registers them all."""

from xai_core.attribution import cam, gradients, kl_hessian
from xai_core.attribution.interface import (
    PartScores,
    attribute,
    attribute_classes,
    join_scores,
    paint_parts,
    score_parts,
    upsample_map,
)

__all__ = [
    "PartScores",
    "attribute",
    "attribute_classes",
    "cam",
    "gradients",
    "join_scores",
    "kl_hessian",
    "paint_parts",
    "score_parts",
    "upsample_map",
]
