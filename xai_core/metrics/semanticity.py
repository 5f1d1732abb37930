"""Semanticity of importance maps: do they follow the object, are they sparse and reproducible?"""
