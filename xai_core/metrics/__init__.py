"""Metrics of explanations, one exact definition each; importing this package registers them all."""

from xai_core.metrics import curves
from xai_core.metrics.evaluate import Evaluation, evaluate, join_evaluations
from xai_core.metrics.trajectory import Baseline, Curve, Trajectory

__all__ = ["Baseline", "Curve", "Evaluation", "Trajectory", "curves", "evaluate", "join_evaluations"]
