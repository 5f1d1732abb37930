"""Rank stability: does noise reorder the parts?"""
