"""k-means over the visual tokens of one image."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from xai_core.parts.parser import ParserInput
from xai_core.parts.positions import cluster_positions
from xai_core.registry import parsers


@dataclass(frozen=True)
class TokenOptions:
    """``restarts``: how often k-means starts anew; the solution with the smallest inertia is kept."""

    restarts: int = 4


@parsers.register("tokens", options=TokenOptions, paper="KL-Hessian, section 4.1", needs=("features",))
def tokens(given: ParserInput, options: TokenOptions) -> np.ndarray:
    """k-means over visual tokens, each image on its own (KL-Hessian, section 4.1)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    def cluster(vectors: np.ndarray) -> np.ndarray:
        return KMeans(given.k, n_init=options.restarts, random_state=given.seed).fit_predict(vectors)

    with warnings.catch_warnings():
        # An image of fewer distinct tokens than k (a plain background) rightly gets fewer parts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cluster_positions(given, cluster)
