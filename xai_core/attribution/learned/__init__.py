"""Explainers that learn: AHA (Learn to Rank: Visual Attribution by Learning Importance Ranking, 2026)."""

from xai_core.attribution.learned import method
from xai_core.attribution.learned.checkpoint import Trained, trained_decoder
from xai_core.attribution.learned.decoder import DecoderConfig, LearnedExplainer
from xai_core.attribution.learned.objective import AhaObjective, AreaOptions, ExplainerOptions, LearningOptions
from xai_core.attribution.learned.refinement import refined

__all__ = [
    "AhaObjective",
    "AreaOptions",
    "DecoderConfig",
    "ExplainerOptions",
    "LearnedExplainer",
    "LearningOptions",
    "Trained",
    "method",
    "refined",
    "trained_decoder",
]
