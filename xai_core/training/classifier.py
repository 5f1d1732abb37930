"""A classifier as an objective: cross-entropy with smoothed labels, measured by how often it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor, nn

from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.training.kinds import kinds


@dataclass(frozen=True)
class ClassifierOptions:
    """``label_smoothing``: the share of the target probability that is spread evenly over all classes."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing: expected 0 to below 1, got {self.label_smoothing}")


class CrossEntropy:
    """An :class:`~xai_core.training.Objective`: a module ``[B, 3, H, W]`` to logits that learns its labels."""

    def __init__(
        self, module: nn.Module, normalise: Callable[[Tensor], Tensor], options: ClassifierOptions | None = None
    ) -> None:
        self.trained = module.requires_grad_(True)
        self._normalise = normalise
        self._options = options or ClassifierOptions()

    def loss(
        self, pictures: Tensor, labels: Tensor, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, and the share that is right beside it."""
        logits = self.trained(self._normalise(pictures)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self._options.label_smoothing)
        return loss, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``score``: 1 where the highest logit is the label; ``loss``: the cross-entropy, labels not smoothed."""
        logits = self.trained(self._normalise(pictures)).float()
        right = (logits.argmax(dim=1) == labels).float()
        return {"score": right, "loss": F.cross_entropy(logits, labels, reduction="none")}


@kinds.register("classifier", group="classifier", options=ClassifierOptions, own_model=True)
def classifier_objective(model: Classifier, options: ClassifierOptions) -> CrossEntropy:
    """A timm classifier of one's own; its file is what ``model.checkpoint`` of a study names."""
    return CrossEntropy(model.module, model.normalise, options)
