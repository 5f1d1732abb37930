"""Metrics of explanations, one exact definition each; importing this package registers them all."""

from xai_core.baselines import Baseline
from xai_core.metrics import (
    complexity,
    localisation,
    perturbation,
    randomisation,
    robustness,
    semanticity,
    true_effects,
)
from xai_core.metrics.evaluate import Evaluation, evaluate, join_evaluations
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.trajectory import Curve, Trajectory
from xai_core.metrics.truth import Truth

__all__ = [
    "Baseline",
    "Curve",
    "Evaluation",
    "Evidence",
    "Measured",
    "Trajectory",
    "Truth",
    "complexity",
    "evaluate",
    "join_evaluations",
    "localisation",
    "perturbation",
    "randomisation",
    "robustness",
    "semanticity",
    "true_effects",
]
