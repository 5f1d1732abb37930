"""What the paper asks of a trained IA, EA or PA: accuracy by threshold, sparsity and semanticity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.inherent.checkpoint import has_importance
from xai_core.inherent.patches import check_threshold, enlarge, kept_patches
from xai_core.inherent.pixel import PixelMasking
from xai_core.inherent.semanticity import semanticity
from xai_core.models import Classifier
from xai_core.precision import Precision, own_modes
from xai_core.training.evaluation import Pictures, matched, picked

Direction = Literal["own", "insertion", "deletion"]
#: Those of Tables 4 and 5.
THRESHOLDS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Trial:
    """A way to hide patches: ``insertion`` (those of at least t stay), ``deletion`` (those below t stay).

    ``own`` is the network as it is, with no threshold beside its own.
    """

    direction: Direction
    threshold: float | None = None


@dataclass(frozen=True)
class ThresholdRow(Trial):
    """A line of Table 4 (``insertion``) or 5 (``deletion``).

    ``accuracy`` and ``masked``, the share of patches that are hidden, are in [0, 1], over so many ``images``.
    """

    accuracy: float = torch.nan
    masked: float = torch.nan
    images: int = 0


@dataclass(frozen=True)
class SemanticityRow:
    """The mean of a metric over those ``images`` for which it is defined; NaN over none."""

    metric: str
    value: float
    images: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured of N pictures, picture by picture, on the CPU.

    ``importance`` ``[N, h, w]``. By trial ``correct`` ``[N, M]`` (is the highest logit the label?) and ``masked``
    ``[N, M]``, the share of patches that were hidden. By metric ``scores`` ``[N]`` (NaN: undefined) with
    ``reasons`` why one has none. ``finite`` ``[N]``: whether importance and all logits are numbers; what is told
    of the other pictures means nothing.
    """

    trials: tuple[Trial, ...]
    importance: Tensor
    correct: Tensor
    masked: Tensor
    scores: Mapping[str, Tensor]
    reasons: Mapping[str, tuple[str | None, ...]]
    finite: Tensor

    def take(self, rows: Sequence[int]) -> Evaluation:
        """That of some of the pictures, in their order."""
        at = list(rows)
        return Evaluation(
            self.trials,
            self.importance[at],
            self.correct[at],
            self.masked[at],
            {name: values[at] for name, values in self.scores.items()},
            {name: tuple(why[row] for row in at) for name, why in self.reasons.items()},
            self.finite[at],
        )

    @cached_property
    def thresholds(self) -> list[ThresholdRow]:
        """Means over the pictures, trial by trial."""
        means = (values.double().mean(dim=0).tolist() for values in (self.correct, self.masked))
        return [
            ThresholdRow(trial.direction, trial.threshold, accuracy, masked, len(self.correct))
            for trial, accuracy, masked in zip(self.trials, *means, strict=True)
        ]

    @cached_property
    def semanticity(self) -> list[SemanticityRow]:
        """Means over the pictures that have a value, metric by metric."""
        return [
            SemanticityRow(name, float(values.nanmean()), int((~values.isnan()).sum()))
            for name, values in self.scores.items()
        ]


def evaluate(
    model: Classifier,
    pictures: Pictures,
    labels: Tensor,
    masks: Tensor | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 128,
) -> Evaluation:
    """Accuracy by threshold in both directions, sparsity s, and against masks d and the macro IoU, in float32.

    Beside them what the same measures say of a picture that shows nothing: :func:`~.semanticity.semanticity`.

    Args:
        pictures: uint8 ``[N, 3, H, W]`` at the model's input size; labels: ``[N]``.
        masks: ``[N, H, W]``: 1 on the object, 0 elsewhere, 255 where nobody knows.
        batch_size: the most pictures in one pass; it changes no result.

    Raises:
        UsageError: as :func:`evaluate_images`, or no pictures.
    """
    pictures, labels = matched(pictures, labels, "pictures")
    found = []
    for start in range(0, len(labels), batch_size):
        rows = list(range(start, min(start + batch_size, len(labels))))
        images = model.normalise(picked(pictures, rows, model.device).float() / 255)
        some = None if masks is None else masks[rows]
        found.append(
            evaluate_images(model, images, labels[rows], some, thresholds=thresholds, batch_size=batch_size)
        )
    return join_evaluations(found)


def evaluate_images(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 128,
    precision: Precision = "fp32",
) -> Evaluation:
    """:func:`evaluate` of one batch of normalised pictures ``[B, 3, H, W]``.

    Importance and embeddings are computed once a picture and masked for all thresholds; an EA's embeddings are
    masked as appendix F does, a PA's pixels as section 4.2 does, in place of its own threshold. Thresholds between
    which no patch of a picture lies hide the same patches of it, and are decided once.

    Args:
        batch_size: the most masked pictures in one pass.

    Raises:
        UsageError: a model without an importance (PA(p, 0) has none), or thresholds outside of [0, 1].
    """
    check_importance(model)
    for threshold in thresholds:
        check_threshold(threshold)
    labels = labels.to(images.device)
    with own_modes(precision, images.device):
        importance, values = model.module.weigh(images)
        kept = _kept(model.module, importance, thresholds)
        correct, finite = _decided(model.module, values, kept, labels, batch_size)
        scores, reasons = semanticity(model, images, importance, labels, masks)
    return Evaluation(
        trials_of(thresholds),
        importance.float().cpu(),
        correct.cpu(),
        (~kept).flatten(2).double().mean(dim=2).T.cpu(),
        scores,
        reasons,
        (finite & importance.isfinite().flatten(1).all(dim=1)).cpu(),
    )


def check_importance(model: Classifier) -> None:
    """Refuses a model without an importance of its own."""
    if not has_importance(model.module):
        raise UsageError(
            f"evaluate: expected an IA, EA or PA with an importance, got {model.spec.name}; PA(p, 0) has "
            "none: evaluate the IA itself"
        )


def join_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of several batches by one network, of which there is at least one, as that of all of them."""
    first = parts[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in parts])

    return Evaluation(
        first.trials,
        joined("importance"),
        joined("correct"),
        joined("masked"),
        {name: torch.cat([one.scores[name] for one in parts]) for name in first.scores},
        {name: tuple(why for one in parts for why in one.reasons[name]) for name in first.reasons},
        joined("finite"),
    )


def trials_of(thresholds: Iterable[float]) -> tuple[Trial, ...]:
    """The network as it is, and both directions at every threshold."""
    at = tuple(thresholds)
    return (Trial("own"), *(Trial("insertion", one) for one in at), *(Trial("deletion", one) for one in at))


def _kept(module: nn.Module, importance: Tensor, thresholds: Sequence[float]) -> Tensor:
    """``[M, B, h, w]``: of every trial, the patches that stay."""
    at = importance.new_tensor(tuple(thresholds)).view(-1, 1, 1, 1)
    masking = isinstance(module, PixelMasking)
    own = module.kept(importance) if masking else torch.ones_like(importance, dtype=torch.bool)
    inserted, deleted = (kept_patches(importance.unsqueeze(0), at, inverted) for inverted in (False, True))
    return torch.cat([own.unsqueeze(0), inserted, deleted])


def _decided(
    module: nn.Module, values: Tensor, kept: Tensor, labels: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """By picture ``[B, M]`` whether it is classified rightly, and ``[B]`` whether all its logits are numbers."""
    flat = kept.flatten(0, 1)
    owner = torch.arange(len(flat), device=flat.device) % len(values)
    # One row for each picture and each set of patches of it.
    named = torch.cat([owner.view(-1, 1), flat.flatten(1)], dim=1).to(torch.int32)
    distinct, place = torch.unique(named, dim=0, return_inverse=True)
    owner, shown = distinct[:, 0].long(), distinct[:, 1:].bool().view(-1, *kept.shape[2:])

    def decided(rows: slice) -> Tensor:
        masked = values[owner[rows]] * enlarge(shown[rows], values.shape[-2:])
        logits = module.decide(masked)
        right = logits.argmax(dim=1) == labels[owner[rows]]
        return torch.stack([right, logits.isfinite().all(dim=1)])

    right, finite = torch.cat(run_batches(decided, len(shown), batch_size), dim=1)[:, place].unflatten(
        1, kept.shape[:2]
    )
    return right.T, finite.all(dim=0)
