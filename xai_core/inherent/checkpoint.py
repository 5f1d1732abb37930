"""Trained importance: reading an IA from its file, and handing its importance down to an EA or a PA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xai_core.create_args import without_paths
from xai_core.errors import UsageError
from xai_core.inherent.architectures import (
    EmbeddingArchitecture,
    ImportanceArchitecture,
    ImportanceConfig,
    as_json,
)
from xai_core.inherent.pixel import PixelMasking
from xai_core.models import Classifier
from xai_core.training.weights_file import read_trained

# What both sides must agree on for the networks to be the same, by the heir's name and the IA's.
_OF_EMBEDDINGS = {
    name: name
    for name in ("img_size", "patch_size", "embed_dim", "importance_width", "component_width", "mean", "std")
}
_OF_PIXELS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "importance_width": "importance_width",
    "importance_mean": "mean",
    "importance_std": "std",
}


def load_importance(path: Path | str, device: str | torch.device = "cpu") -> ImportanceArchitecture:
    """The IA of a file that ``vitrine train importance`` wrote, in evaluation mode and without gradients.

    Raises:
        UsageError: no such file, a file of another kind, or weights that do not fit what it says of them.
    """
    tensors, about = read_trained(path, kinds=("ia",))
    try:
        module = ImportanceArchitecture(ImportanceConfig(**about["config"]["create_args"]))
        module.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"checkpoint: expected the weights of the IA that its header names, got others in {path} ({error}); "
            "train it anew"
        ) from error
    return module.eval().requires_grad_(False).to(device)


def inherit_importance(heir: nn.Module, path: Path | str) -> None:
    """Gives an EA (ImportanceNet and ComponentNet) or a PA (ImportanceNet) the weights of a trained IA.

    Raises:
        UsageError: as :func:`load_importance`, or an IA of another patch, size, width or normalisation.
    """
    source = load_importance(path)
    whole = isinstance(heir, EmbeddingArchitecture)
    config: Any = heir.config
    _refuse_other(config, source.config, _OF_EMBEDDINGS if whole else _OF_PIXELS, path)
    heir.get_submodule("importance_net").load_state_dict(source.importance_net.state_dict())
    heir.get_submodule("importance_net").requires_grad_(False)
    if whole:
        heir.get_submodule("component_net").load_state_dict(source.component_net.state_dict())


def create_args(model: Classifier, config: Any) -> dict[str, Any]:
    """What ``timm.create_model`` takes to build the architecture again, free of where its first weights lay.

    Raises:
        UsageError: a model that is prepared otherwise (size, mean, std) than its architecture was built for.
    """
    facts: Mapping[str, Any] = model.module.pretrained_cfg
    for name in ("input_size", "mean", "std"):
        expected, got = tuple(facts[name]), tuple(model.data_config[name])
        if expected != got:
            raise UsageError(
                f"model.transform.{name}: expected {expected}, as {model.spec.name} was built for, got {got}; set "
                "img_size, mean and std in model.create_args instead"
            )
    return without_paths(as_json(config))


def has_importance(module: nn.Module) -> bool:
    """Whether a network is one of the three architectures and says which patches matter to it."""
    return isinstance(module, (ImportanceArchitecture, EmbeddingArchitecture, PixelMasking))


def _refuse_other(config: Any, source: Any, names: Mapping[str, str], path: Path | str) -> None:
    for name, theirs in names.items():
        expected, got = getattr(config, name), getattr(source, theirs)
        if expected != got:
            raise UsageError(
                f"checkpoint: expected an IA with {theirs} {expected}, got one with {got} in {path}; set {name} "
                "in model.create_args to it, or name another IA"
            )
