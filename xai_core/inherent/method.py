"""The importance of a trained IA as an attribution method, on any study's pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.inherent.architectures import ImportanceArchitecture
from xai_core.inherent.checkpoint import load_importance
from xai_core.models import Classifier
from xai_core.registry import methods
from xai_core.training.weights_file import checkpoint_id, digest_of


@dataclass(frozen=True)
class ImportanceOptions:
    """``checkpoint``: the file of a trained IA (``vitrine train importance``)."""

    checkpoint: str = ""

    def in_id(self) -> dict[str, str]:
        """What stands in ids: which content, never where it lies."""
        return {"checkpoint": checkpoint_id(self.checkpoint)} if self.checkpoint else {}


def _has_checkpoint(_model: Classifier, options: ImportanceOptions) -> str | None:
    return None if options.checkpoint else "it needs its option checkpoint, the file of a trained IA"


@methods.register(
    "importance",
    options=ImportanceOptions,
    paper="Importance Architectures",
    equation="section 3.1 (a)",
    needs=(_has_checkpoint,),
    upsampling="nearest",
    cost="1 pass of the ImportanceNet, a ResNet-18 by default; none of the model",
    class_specific=False,
    gradient_free=True,
)
def importance(
    model: Classifier, images: Tensor, classes: Tensor, options: ImportanceOptions, batch_size: int
) -> Tensor:
    """Importance of a trained IA: the sigmoid score of every patch, which names no class and asks no model."""
    architecture = _loaded(options.checkpoint, digest_of(options.checkpoint), str(images.device))
    found = architecture.importance(_as_its_own(architecture, model.denormalise(images)))
    return found.unsqueeze(1).expand(-1, classes.shape[1], -1, -1)


def _as_its_own(architecture: ImportanceArchitecture, pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] at the IA's size and in its normalisation."""
    config = architecture.config
    size = (config.img_size, config.img_size)
    resized = pictures.float()
    if pictures.shape[-2:] != size:
        resized = F.interpolate(resized, size=size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (resized.new_tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (resized - mean) / std


@lru_cache(maxsize=2)
def _loaded(path: str, digest: str, device: str) -> ImportanceArchitecture:
    """Read once a process and content: the digest is part of the memory's key."""
    return load_importance(Path(path), device)
