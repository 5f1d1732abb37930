"""Metrics that explain again, from a changed image, and compare."""

from xai_core.metrics.robustness import manipulation, rank_stability, sensitivity, stability

__all__ = ["manipulation", "rank_stability", "sensitivity", "stability"]
