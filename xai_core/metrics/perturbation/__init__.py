"""Metrics that perturb the image along a map and watch the model."""
