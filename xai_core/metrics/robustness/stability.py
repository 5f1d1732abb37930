"""Stability: how far a map moves against how far the image moved."""
