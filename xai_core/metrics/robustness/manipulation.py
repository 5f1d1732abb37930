"""Adversarial manipulation: can a map be changed while the model's answer stays?"""
