"""Pointing game: is the strongest pixel on the object?"""
