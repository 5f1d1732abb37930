"""Concepts: feature vectors drawn where they matter, dictionaries of them and codes in those.

Importing this package registers the extractors.
"""

from xai_core.concepts import bisecting_kmeans, dictionary_learning, sae
from xai_core.concepts.coding import (
    Evaluation,
    encode,
    evaluate,
    l0_ratio,
    reconstruction,
    rel_l2,
)
from xai_core.concepts.dictionary import Dictionary, default_atoms, fit_dictionary
from xai_core.concepts.lasso import lasso_codes
from xai_core.concepts.pfv import PfvSample, check_layer, contribution, sample_pfvs

__all__ = [
    "Dictionary",
    "Evaluation",
    "PfvSample",
    "bisecting_kmeans",
    "check_layer",
    "contribution",
    "default_atoms",
    "dictionary_learning",
    "encode",
    "evaluate",
    "fit_dictionary",
    "l0_ratio",
    "lasso_codes",
    "reconstruction",
    "rel_l2",
    "sae",
    "sample_pfvs",
]
