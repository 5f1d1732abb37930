"""Metrics that explain again, from a changed image, and compare."""
