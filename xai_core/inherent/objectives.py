"""What IA, EA and PA learn: cross-entropy alone, in two stages (section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor, nn

from xai_core.errors import UsageError
from xai_core.inherent.architectures import EmbeddingArchitecture, ImportanceArchitecture
from xai_core.inherent.checkpoint import create_args, has_importance, inherit_importance
from xai_core.inherent.patches import enlarge
from xai_core.inherent.pixel import PixelConfig, PixelMasking
from xai_core.models import Classifier
from xai_core.registry import NoOptions
from xai_core.training.kinds import kinds
from xai_core.training.weights_file import digest_of


@dataclass(frozen=True)
class HeirOptions:
    """``checkpoint``: the file of the trained IA whose importance is inherited; a PA(p, 0) needs none."""

    checkpoint: str = ""


class ArchitectureObjective:
    """An :class:`~xai_core.training.Objective`: an architecture that learns labels by plain cross-entropy.

    Nothing else is asked of the importance: the bottleneck alone makes it (section 3.1).
    """

    def __init__(self, module: nn.Module, normalise: Callable[[Tensor], Tensor]) -> None:
        self.trained, self._normalise = module, normalise

    def loss(
        self, pictures: Tensor, labels: Tensor, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; beside it the share that is right, and what :func:`read` tells of the importance."""
        logits, told = read(self.trained, self._normalise(pictures))
        right = (logits.detach().argmax(dim=1) == labels).float()
        told = {name: value.detach().mean() for name, value in told.items()}
        return F.cross_entropy(logits, labels), {"accuracy": right.mean(), **told}

    def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``score``: 1 where the highest logit is the label; ``loss``; and what :func:`read` tells."""
        logits, told = read(self.trained, self._normalise(pictures))
        right = (logits.argmax(dim=1) == labels).float()
        return {"score": right, "loss": F.cross_entropy(logits, labels, reduction="none"), **told}


def read(module: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``[B, classes]`` in float32, and of each picture ``[B]``, as far as the network has an importance:

    ``importance``, the mean of its patches' (the sparsity s of appendix D), and ``masked``, the share of patches
    that a PA masks.
    """
    if not has_importance(module):
        return module(images).float(), {}
    importance, values = module.weigh(images)
    told = {"importance": importance.flatten(1).mean(dim=1)}
    if isinstance(module, PixelMasking):
        kept = module.kept(importance)
        values = values * enlarge(kept, values.shape[-2:])
        told["masked"] = 1 - kept.flatten(1).float().mean(dim=1)
    return module.decide(values).float(), told


def _created(model: Classifier, options: Any) -> dict[str, Any]:
    """What builds the network again, and the digest of the IA that it inherits from."""
    checkpoint = getattr(options, "checkpoint", "")
    return {
        "name": model.spec.name,
        "create_args": create_args(model, model.module.config),
        "importance": digest_of(checkpoint) if checkpoint else None,
    }


@kinds.register("ia", group="importance", own_model=True, method="importance", config=_created)
def importance_objective(model: Classifier, options: NoOptions) -> ArchitectureObjective:
    """IA(p, k): the first stage, which finds the importance; the model is a ``vitrine_ia``."""
    _expect(model, "vitrine_ia", isinstance(model.module, ImportanceArchitecture))
    return ArchitectureObjective(model.module.requires_grad_(True), model.normalise)


@kinds.register("ea", group="importance", own_model=True, options=HeirOptions, config=_created)
def embedding_objective(model: Classifier, options: HeirOptions) -> ArchitectureObjective:
    """EA(p, k): a ContextNet on a trained IA's embeddings; the model is a ``vitrine_ea``."""
    _expect(model, "vitrine_ea", isinstance(model.module, EmbeddingArchitecture))
    return _heir(model, options)


@kinds.register("pa", group="importance", own_model=True, options=HeirOptions, config=_created)
def pixel_objective(model: Classifier, options: HeirOptions) -> ArchitectureObjective:
    """PA(p, t): a backbone on pictures masked by a trained IA's importance; the model is a ``vitrine_pa``."""
    config: Any = getattr(model.module, "config", None)
    _expect(model, "vitrine_pa", isinstance(config, PixelConfig))
    if not config.whole:
        return _heir(model, options)
    if options.checkpoint:
        raise UsageError(
            "checkpoint: expected none for PA(p, 0), which masks nothing; leave it out, or set threshold"
        )
    return ArchitectureObjective(model.module.requires_grad_(True), model.normalise)


def _heir(model: Classifier, options: HeirOptions) -> ArchitectureObjective:
    if not options.checkpoint:
        raise UsageError(
            f"checkpoint: expected the file of a trained IA, whose importance a {model.spec.name} inherits, got "
            "none; train one of kind ia first"
        )
    model.module.requires_grad_(True)
    inherit_importance(model.module, options.checkpoint)
    return ArchitectureObjective(model.module, model.normalise)


def _expect(model: Classifier, name: str, fits: bool) -> None:
    if not fits:
        raise UsageError(f"model.name: expected {name}, got {model.spec.name}; this kind of training makes one")
