"""Metrics that perturb the image along a map and watch the model."""

from xai_core.metrics.perturbation import curves, faithfulness_correlation, information_curves, irof, road, saco

__all__ = ["curves", "faithfulness_correlation", "information_curves", "irof", "road", "saco"]
