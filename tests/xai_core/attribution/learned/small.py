"""Explainers of tiny models, in float64 and of random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from xai_core.attribution.learned import DecoderConfig, ExplainerOptions, LearnedExplainer
from xai_core.models import Classifier
from xai_core.training import model_digest, save_trained

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
    about = {
        "kind": "aha",
        "config": dataclasses.asdict(chosen),
        "weights": model_digest(model),
        "model": {"name": model.spec.name},
    }
    save_trained(path, explainer.decoder, about)
    return path
