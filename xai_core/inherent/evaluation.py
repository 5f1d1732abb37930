"""What the paper asks of IA, EA and PA: accuracy by threshold, sparsity, reproducibility and semanticity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.inherent.checkpoint import has_importance
from xai_core.inherent.patches import check_threshold, enlarge, kept_patches
from xai_core.inherent.pixel import PixelMasking
from xai_core.metrics.evaluate import evaluate as measure
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.semanticity import ImportanceOptions
from xai_core.metrics.truth import Truth
from xai_core.models import Classifier
from xai_core.precision import own_modes
from xai_core.registry import metrics
from xai_core.training.evaluation import Pictures, matched, picked

Direction = Literal["own", "insertion", "deletion"]
#: Those of Tables 4 and 5.
THRESHOLDS = tuple(step / 10 for step in range(11))
_OF_MASKS = ("segmentation_difference", "macro_iou")


@dataclass(frozen=True)
class ThresholdRow:
    """A line of Table 4 (``insertion``: patches of at least t stay) or 5 (``deletion``: those below t stay).

    ``own`` is the network as it is, with no threshold beside its own. ``accuracy`` and ``masked``, the share of
    patches that are hidden, are in [0, 1], over so many ``images``.
    """

    direction: Direction
    threshold: float | None
    accuracy: float
    masked: float
    images: int


@dataclass(frozen=True)
class SemanticityRow:
    """The mean of a metric over those ``images`` for which it is defined; NaN over none."""

    metric: str
    value: float
    images: int


@dataclass(frozen=True)
class Evaluation:
    """``importance`` ``[N, h, w]`` of the pictures, and what was measured of it."""

    importance: Tensor
    thresholds: list[ThresholdRow] = field(default_factory=list)
    semanticity: list[SemanticityRow] = field(default_factory=list)


def evaluate(
    model: Classifier,
    pictures: Pictures,
    labels: Tensor,
    masks: Tensor | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 128,
) -> Evaluation:
    """Accuracy by threshold in both directions, sparsity s, and against masks d and the macro IoU.

    Importance and embeddings are computed once a picture and masked for all thresholds; an EA's embeddings are
    masked as appendix F does, a PA's pixels as section 4.2 does, in place of its own threshold.

    Args:
        pictures: uint8 ``[N, 3, H, W]`` at the model's input size; labels: ``[N]``.
        masks: ``[N, H, W]``: 1 on the object, 0 elsewhere, 255 where nobody knows.
        batch_size: the most pictures in one pass; it changes no result.

    Raises:
        UsageError: a model without an importance (PA(p, 0) has none), or thresholds outside of [0, 1].
    """
    if not has_importance(model.module):
        raise UsageError(
            f"evaluate: expected an IA, EA or PA with an importance, got {model.spec.name}; PA(p, 0) has "
            "none: evaluate the IA itself"
        )
    for threshold in thresholds:
        check_threshold(threshold)
    pictures, labels = matched(pictures, labels, "pictures")
    chosen = _Thresholds(model.module, tuple(thresholds))
    found, right, hidden, measured = [], 0, 0, []
    with own_modes("fp32", model.device):
        for start in range(0, len(labels), batch_size):
            rows = list(range(start, min(start + batch_size, len(labels))))
            images = model.normalise(picked(pictures, rows, model.device).float() / 255)
            importance, values = model.module.weigh(images)
            kept = chosen.kept(importance)
            known = labels[rows].to(model.device)
            right = right + _right(model.module, values, kept, known, batch_size)
            hidden = hidden + (~kept).double().mean(dim=(2, 3)).sum(dim=1)
            found.append(importance.float().cpu())
            truth = Truth(None if masks is None else masks[rows].to(model.device))
            measured.append(_semanticity(model, images, importance, known, truth))
    return Evaluation(
        torch.cat(found),
        chosen.rows(right, hidden, len(labels)),
        _means(measured),
    )


def reproducibility(runs: Sequence[Tensor]) -> float:
    """r (equation 3): how far importance varies from one training's seed to another's.

    Args:
        runs: importance ``[N, h, w]`` of the same pictures, one tensor a training, at least two. The standard
            deviation has n - 1 in its denominator, as the metric ``reproducibility``.

    Raises:
        UsageError: a single training, or importance of other pictures or patches.
    """
    shapes = {tuple(run.shape) for run in runs}
    if len(runs) < 2 or len(shapes) != 1:
        raise UsageError(
            f"reproducibility: expected the importance of the same patches from at least 2 trainings, got "
            f"{len(runs)} of shapes {sorted(shapes)}"
        )
    return float(torch.stack([run.double() for run in runs]).std(dim=0).mean())


@dataclass(frozen=True)
class _Thresholds:
    """The masks to try: the network's own, and both directions at every threshold."""

    module: nn.Module
    thresholds: tuple[float, ...]

    def kept(self, importance: Tensor) -> Tensor:
        """``[M, B, h, w]``: of every mask, the patches that stay."""
        at = importance.new_tensor(self.thresholds).view(-1, 1, 1, 1)
        masking = isinstance(self.module, PixelMasking)
        own = self.module.kept(importance) if masking else torch.ones_like(importance, dtype=torch.bool)
        inserted, deleted = (kept_patches(importance.unsqueeze(0), at, inverted) for inverted in (False, True))
        return torch.cat([own.unsqueeze(0), inserted, deleted])

    def rows(self, right: Tensor, hidden: Tensor, images: int) -> list[ThresholdRow]:
        """Sums over the images ``[M]`` as rows."""
        directions: list[tuple[Direction, float | None]] = [("own", None)]
        directions += [("insertion", threshold) for threshold in self.thresholds]
        directions += [("deletion", threshold) for threshold in self.thresholds]
        shares = zip((right / images).tolist(), (hidden / images).tolist(), strict=True)
        return [
            ThresholdRow(direction, threshold, accuracy, masked, images)
            for (direction, threshold), (accuracy, masked) in zip(directions, shares, strict=True)
        ]


def _right(module: nn.Module, values: Tensor, kept: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """How many pictures are classified rightly ``[M]`` under each of the masks ``[M, B, h, w]``."""
    flat = kept.flatten(0, 1)
    owner = torch.arange(len(flat), device=flat.device) % len(values)

    def decided(rows: slice) -> Tensor:
        masked = values[owner[rows]] * enlarge(flat[rows], values.shape[-2:])
        return module.decide(masked).argmax(dim=1) == labels[owner[rows]]

    return torch.cat(run_batches(decided, len(flat), batch_size)).view(kept.shape[:2]).double().sum(dim=1)


def _semanticity(
    model: Classifier, images: Tensor, importance: Tensor, labels: Tensor, truth: Truth
) -> dict[str, Tensor]:
    """The metrics of section 4.1 and appendix D of a batch, by id: importance as it is, patch by patch."""
    options: Any = ImportanceOptions(model.module.config.patch_size, "none")
    maps = enlarge(importance, images.shape[-2:]).squeeze(1)
    names = ("sparsity", *(() if truth.mask is None else _OF_MASKS))
    evidence = Evidence(model, images, labels, maps, truth=truth)
    found = measure(evidence, [(metrics.get(name), options) for name in names])
    return dict(zip(names, found.values.values(), strict=True))


def _means(measured: Sequence[dict[str, Tensor]]) -> list[SemanticityRow]:
    joined = {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
    return [
        SemanticityRow(name, float(values.nanmean()), int((~values.isnan()).sum()))
        for name, values in joined.items()
    ]
