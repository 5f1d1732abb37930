"""Sanity checks: does the map notice that the model was randomised, or that another class is asked for?"""

from xai_core.metrics.randomisation.check import RandomisationOptions, randomisation

__all__ = ["RandomisationOptions", "randomisation"]
