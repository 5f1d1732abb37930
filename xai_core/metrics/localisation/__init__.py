"""Metrics that compare a map with where the object is known to be."""

from xai_core.metrics.localisation import grid_pointing_game, overlap, pointing_game, top_k

__all__ = ["grid_pointing_game", "overlap", "pointing_game", "top_k"]
