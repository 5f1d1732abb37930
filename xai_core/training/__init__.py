"""Training: one loop for everything that learns here, and the kinds of things that do."""

from xai_core.training.classifier import ClassifierOptions, CrossEntropy
from xai_core.training.evaluation import evaluate
from xai_core.training.kinds import KindEntry, kinds, kinds_of_method
from xai_core.training.loop import LogRow, Training
from xai_core.training.objective import Objective
from xai_core.training.recipe import Recipe
from xai_core.training.weights_file import (
    checkpoint_id,
    digest_of,
    model_digest,
    read_about,
    read_trained,
    save_trained,
)

__all__ = [
    "ClassifierOptions",
    "CrossEntropy",
    "KindEntry",
    "LogRow",
    "Objective",
    "Recipe",
    "Training",
    "checkpoint_id",
    "digest_of",
    "evaluate",
    "kinds",
    "kinds_of_method",
    "model_digest",
    "read_about",
    "read_trained",
    "save_trained",
]
