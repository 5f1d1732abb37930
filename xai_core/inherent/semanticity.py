"""What an importance is: how sparse, how much on the object, and how much of it the place alone (section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xai_core.inherent.patches import enlarge
from xai_core.metrics.correlation import pearson
from xai_core.metrics.evaluate import evaluate as measure
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.semanticity import ImportanceOptions
from xai_core.metrics.truth import Truth
from xai_core.models import Classifier
from xai_core.registry import metrics

# Of the importance of a blank picture: a control that the paper has not. What it reaches needs no picture.
_BLANK = "blank_"
_AGAINST_MASKS = ("segmentation_difference", "macro_iou")
CORRELATION = f"{_BLANK}correlation"
#: The measures of importance alone, and those that compare it with masks of objects.
OF_IMPORTANCE = ("sparsity", CORRELATION)
OF_MASKS = (*_AGAINST_MASKS, *(f"{_BLANK}{name}" for name in _AGAINST_MASKS))
_CONSTANT = "the importance of the picture or of a blank one is the same everywhere"

Scores = dict[str, Tensor]
Reasons = dict[str, tuple[str | None, ...]]


def semanticity(
    model: Classifier, images: Tensor, importance: Tensor, labels: Tensor, masks: Tensor | None
) -> tuple[Scores, Reasons]:
    """Of every picture s (appendix D) and, against masks, d and the macro IoU (section 4.1), importance as it is.

    Beside them controls: d and the macro IoU of the importance that the network gives a blank picture, and how
    its own importance correlates with that. Near 1 it tells the place of a patch, not what is there.

    Args:
        importance: ``[B, h, w]`` of the images; masks: ``[B, H, W]`` as :class:`Truth` has them, or None.

    Returns:
        By measure values ``[B]`` on the CPU, NaN where one is undefined, and why.
    """
    blank = model.module.importance(torch.zeros_like(images[:1])).expand_as(importance)
    truth = Truth(None if masks is None else masks.to(images.device))
    of_masks = () if masks is None else _AGAINST_MASKS
    scores, reasons = _measured(model, images, importance, labels, truth, ("sparsity", *of_masks))
    of_blank, why_blank = _measured(model, images, blank, labels, truth, of_masks)
    alike = pearson(importance.double().flatten(1), blank.double().flatten(1)).cpu()
    controls = {f"{_BLANK}{name}": values for name, values in of_blank.items()}
    why = {f"{_BLANK}{name}": values for name, values in why_blank.items()}
    constant = tuple(_CONSTANT if undefined else None for undefined in alike.isnan().tolist())
    return {**scores, CORRELATION: alike, **controls}, {**reasons, CORRELATION: constant, **why}


def _measured(
    model: Classifier, images: Tensor, importance: Tensor, labels: Tensor, truth: Truth, names: tuple[str, ...]
) -> tuple[Scores, Reasons]:
    """Metrics of the registry, patch by patch."""
    if not names:
        return {}, {}
    options: Any = ImportanceOptions(model.module.config.patch_size, "none")
    maps = enlarge(importance, images.shape[-2:]).squeeze(1)
    evidence = Evidence(model, images, labels, maps, truth=truth)
    found = measure(evidence, [(metrics.get(name), options) for name in names])
    scores = {name: one.cpu() for name, one in zip(names, found.values.values(), strict=True)}
    return scores, dict(zip(names, found.reasons.values(), strict=True))
