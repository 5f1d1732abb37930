"""Sanity checks: does the map notice that the model was randomised?"""
