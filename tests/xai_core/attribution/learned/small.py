"""Explainers of tiny models, in float64 and of random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from xai_core.attribution.learned import DecoderConfig, ExplainerOptions, LearnedExplainer
from xai_core.models import Classifier
from xai_core.training import kinds, model_digest, save_trained

CONFIG = DecoderConfig(grid=4, width=8, blocks=1, guide=4, stride=2)


def explainer_of(model: Classifier, config: DecoderConfig = CONFIG, seed: int = 0) -> LearnedExplainer:
    """A decoder whose refinement is not the zero that it begins as."""
    torch.manual_seed(seed)
    explainer = LearnedExplainer(model, config)
    with torch.no_grad():
        torch.nn.init.normal_(explainer.decoder.refine[-1].weight, std=0.3)
    return explainer


def checkpoint_of(model: Classifier, path: Path, seed: int = 0, **options: object) -> Path:
    """A file as training writes it."""
    explainer = explainer_of(model, seed=seed)
    chosen = ExplainerOptions(**{**dataclasses.asdict(CONFIG), "steps": 4, **options})
    save_trained(path, explainer.decoder, about_of(model, kinds.get("aha").config(model, chosen)))
    return path


def about_of(model: Classifier, config: Mapping[str, object]) -> dict[str, object]:
    """The header of a model's file, with this config."""
    return {
        "kind": "aha",
        "config": dict(config),
        "weights": model_digest(model),
        "model": {"name": model.spec.name},
    }
