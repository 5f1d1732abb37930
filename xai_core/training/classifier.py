"""A classifier as an objective: cross-entropy with smoothed labels, measured by how often it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor, nn

from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.training.kinds import kinds
from xai_core.training.loop import Training
from xai_core.training.recipe import Recipe


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


#: Called after each epoch with its number from 1 and the mean loss of its batches.
OnEpoch = Callable[[int, float], None]


def train_classifier(
    module: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    recipe: Recipe,
    on_epoch: OnEpoch = lambda epoch, loss: None,
) -> nn.Module:
    """Trains a module in place by cross-entropy, and gives it back in evaluation mode.

    Args:
        pictures: uint8 ``[N, 3, H, W]``, held in memory; labels: ``[N]``.
        normalise: pictures in [0, 1] to the module's input space.

    Raises:
        UsageError: the loss is no number; the message names the step.
    """
    device = next(module.parameters()).device
    training = Training(CrossEntropy(module, normalise), pictures, labels, recipe, device=device)
    while not training.done:
        training.advance(training.steps_per_epoch)
        loss = next(row.value for row in reversed(training.log) if row.name == "loss")
        on_epoch(training.epoch, loss)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(
    module: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    batch_size: int = 256,
) -> float:
    """The share of uint8 pictures ``[N, 3, H, W]`` whose highest logit is their label."""
    right = [
        (module(normalise(batch.float() / 255)).argmax(dim=1) == known).sum()
        for batch, known in zip(pictures.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.stack(right).sum().item() / len(labels)
