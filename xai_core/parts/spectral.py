"""Spectral clustering of the visual tokens of one image."""

from __future__ import annotations

import numpy as np

from xai_core.parts.parser import ParserInput
from xai_core.parts.positions import cluster_positions
from xai_core.registry import parsers


@parsers.register("spectral", paper="KL-Hessian, section 5 (parser choice)", needs=("features",))
def spectral(given: ParserInput, options: object) -> np.ndarray:
    """Spectral clustering of visual tokens on their cosine affinity, each image on its own.

    The eigenvectors of the normalised Laplacian are turned into clusters by pivoted QR (Damle, Minden and
    Ying 2019): no restarts, and nothing to draw.
    """
    from sklearn.cluster import SpectralClustering

    method = SpectralClustering(
        given.k, affinity="precomputed", assign_labels="cluster_qr", random_state=given.seed
    )

    def cluster(vectors: np.ndarray) -> np.ndarray:
        if given.k in (1, len(vectors)):
            # Nothing to decide, and the eigensolver takes neither.
            return np.arange(len(vectors)) % given.k
        return method.fit_predict(_cosine_affinity(vectors))

    return cluster_positions(given, cluster)


def _cosine_affinity(vectors: np.ndarray) -> np.ndarray:
    """Cosines moved to [0, 1]: cut off at 0 instead, tokens without any near one would leave the graph."""
    return (1 + vectors @ vectors.T).clip(0) / 2
