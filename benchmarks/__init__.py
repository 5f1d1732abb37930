"""Timings side by side in one run, as ratios: absolute times belong to one machine, ratios carry over."""
