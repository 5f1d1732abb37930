"""Metrics that compare a map with where the object is known to be."""
