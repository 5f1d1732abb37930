"""Faithfulness correlation: do sums of attributions tell what removing pixels does?"""
