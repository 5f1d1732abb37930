"""Which pixels the object is on, for networks that see pictures in a geometry of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.config import StudyConfig
from tasks.predict import names_of_classes
from tasks.stage import Context
from tasks.truth import Failed, known_needs, told_masks
from tasks.truth_files import teller
from tasks.truth_scenes import scene_of, true_labels
from tasks.worker import Pictures
from xai_core.metrics.truth import INSIDE, OUTSIDE
from xai_core.models import Classifier
from xai_core.parts.labels import NO_PART
from xai_core.synthetic import draw_scene


@dataclass(frozen=True)
class Masks:
    """Masks ``[k, H, W]`` of the pictures that did not fail, or None where a study knows none.

    ``reasons`` say for each why nothing is known of its object, None where something is.
    """

    values: Tensor | None = None
    reasons: tuple[str | None, ...] = ()
    failed: Failed = field(default_factory=dict)


def has_masks(config: StudyConfig) -> bool:
    """Whether a study knows where objects are."""
    return "mask" in known_needs(config)


def masks_of(context: Context, network: Classifier, pictures: Pictures, labels: Tensor) -> Masks:
    """The masks of some pictures in a network's geometry; the object is that of the picture's label."""
    config = context.config
    if not has_masks(config):
        return Masks()
    if config.dataset.kind == "demo":
        drawn = [true_labels(network, draw_scene(scene_of(path))) for path in pictures.paths]
        values = torch.stack(drawn) if drawn else torch.zeros(0, *network.input_size)
        return Masks(torch.where(values == NO_PART, OUTSIDE, INSIDE), (None,) * len(drawn))
    names = names_of_classes(config.dataset, network, labels_are_classes=True)
    tell = teller(config.truth, names, context.work.ingredients["config"]["truth"]["files"])
    values, reasons, failed = told_masks(context, network, tell, pictures, labels.tolist())
    return Masks(values, tuple(reasons), failed)
