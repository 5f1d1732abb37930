"""Concepts as subspaces of a feature space: found by sparse subspace clustering, complete by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_core.concepts.active_set import solve
from xai_core.precision import full_precision

# The share of a direction that must lie outside those kept before it: below, two subspaces meet in it.
INDEPENDENT = 1e-2
_STILL = 1e-7
_RESTARTS = 20


@dataclass(frozen=True)
class Subspaces:
    """Linearly independent unit vectors ``basis`` ``[D, C]`` and the concept ``[D]`` that each belongs to."""

    basis: Tensor
    owner: Tensor

    @property
    def count(self) -> int:
        """Number of concepts."""
        return int(self.owner.max()) + 1 if len(self.owner) else 0


@dataclass(frozen=True)
class Decomposition:
    """Vectors as a sum of one component a concept and one outside all of them.

    ``components`` ``[N, M, C]`` and ``complement`` ``[N, C]``, which is orthogonal to every concept.
    """

    components: Tensor
    complement: Tensor


def find_subspaces(
    vectors: Tensor, *, concepts: int, sparsity: float, variance: float, min_size: int, seed: int
) -> Subspaces:
    """Concept subspaces of feature vectors (Vielhaben et al. 2023, section 3; Grobrügge et al. 2025).

    Unit vectors are clustered by :func:`self_representation` and :func:`spectral_labels`. A concept is a cluster
    of ``min_size`` members or more; its basis are the leading principal directions of its members that hold the
    share ``variance`` of their variance, at most C // (number of concepts). Directions that
    lie in the span of others (:data:`INDEPENDENT`) are left out, so that decompositions are unique.

    Args:
        vectors: ``[N, C]``; zeros and what is not finite are left out.
        concepts: clusters asked for; at most N / 2 are made.

    Returns:
        Subspaces without a single direction where no cluster has members that differ.
    """
    usable = vectors.any(dim=1) & vectors.isfinite().all(dim=1)
    vectors = vectors[usable].detach().double().cpu()
    if len(vectors) < 2:
        return Subspaces(vectors.new_zeros(0, vectors.shape[1]), torch.zeros(0, dtype=torch.int64))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    codes = self_representation(unit, sparsity)
    labels = spectral_labels(codes, max(1, min(concepts, len(unit) // 2)), seed)
    sizes = torch.bincount(labels)
    kept = (sizes >= min_size).nonzero().flatten().tolist()
    cap = max(1, vectors.shape[1] // max(1, len(kept)))
    bases = [principal_directions(vectors[labels == label], variance)[:cap] for label in kept]
    return _independent([basis for basis in bases if len(basis)], vectors.shape[1])


def self_representation(unit: Tensor, sparsity: float) -> Tensor:
    """Each vector as a sparse sum of the others (Elhamifar and Vidal 2013), all at once by :func:`solve`.

    Row i minimises ``1/2 |x_i - c X|^2 + lambda_i |c|_1`` with ``c_i = 0`` and ``lambda_i`` the largest
    ``|x_i . x_j|`` divided by ``sparsity``: at 1 every code is zero.

    Args:
        unit: ``[N, C]`` vectors of length 1.

    Returns:
        ``[N, N]`` codes with a zero diagonal.
    """
    gram = (unit @ unit.T).fill_diagonal_(0.0)
    penalty = (gram.abs().amax(dim=1) / sparsity).clamp(min=torch.finfo(unit.dtype).eps)
    return solve(unit, unit, penalty, excluded=torch.arange(len(unit), device=unit.device)).codes


def spectral_labels(codes: Tensor, clusters: int, seed: int) -> Tensor:
    """Clusters of vectors from their self-representation: normalised spectral clustering, ``[N]`` int64."""
    from sklearn.cluster import KMeans

    rows = torch.nn.functional.normalize(codes, dim=1).abs()
    affinity = (rows + rows.T) / 2
    degree = affinity.sum(dim=1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * affinity * scale)
    embedding = torch.nn.functional.normalize(vectors[:, -clusters:], dim=1).numpy()
    # Eigenvectors come with either sign, and k-means starts from what it draws: fix the sign.
    embedding = embedding * np.where(embedding.sum(axis=0) < 0, -1.0, 1.0)
    found = KMeans(min(clusters, len(np.unique(embedding, axis=0))), n_init=_RESTARTS, random_state=seed)
    return torch.from_numpy(found.fit_predict(embedding)).long()


def principal_directions(vectors: Tensor, variance: float) -> Tensor:
    """The fewest principal directions ``[d, C]`` that hold a share of the variance; none where there is none."""
    centred = vectors - vectors.mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    energy = spread.square()
    if spread[0] <= _STILL * vectors.norm(dim=1).max():
        return directions[:0]
    enough = int((energy.cumsum(0) / energy.sum() < variance).sum()) + 1
    return directions[:enough]


def decompose(vectors: Tensor, subspaces: Subspaces) -> Decomposition:
    """Vectors ``[N, C]`` as the unique sum over concepts and complement (Vielhaben et al. 2023, equation 3).

    Concepts need not be orthogonal to each other; the complement is orthogonal to all of them.
    """
    basis, owner = subspaces.basis, subspaces.owner
    if not len(basis):
        return Decomposition(vectors.new_zeros(len(vectors), 0, vectors.shape[1]), vectors)
    with full_precision(vectors.device):
        coefficients = vectors @ torch.linalg.pinv(basis)
        parts = vectors.new_zeros(len(vectors), subspaces.count, len(basis))
        parts.scatter_(1, owner.expand(len(vectors), 1, -1), coefficients.unsqueeze(1))
        return Decomposition(parts @ basis, vectors - coefficients @ basis)


def completeness(weights: Tensor, subspaces: Subspaces) -> Tensor:
    """The share of each class's weight vector ``[K, C]`` in the span of all concepts, 0 to 1, ``[K]``.

    Squared lengths (Vielhaben et al. 2023, equation 7): 1 means that nothing outside can move the logit.
    """
    outside = decompose(weights, subspaces).complement
    return 1 - outside.square().sum(dim=1) / weights.square().sum(dim=1)


def _independent(bases: list[Tensor], width: int) -> Subspaces:
    """Directions of all concepts in turn, leading ones first, without those that the kept ones span already."""
    ranked = sorted(
        ((rank, concept) for concept, basis in enumerate(bases) for rank in range(len(basis))),
    )
    kept: list[tuple[int, Tensor]] = []
    span = torch.zeros(0, width, dtype=torch.float64)
    for rank, concept in ranked:
        direction = bases[concept][rank]
        rest = direction - (direction @ span.T) @ span
        if rest.norm() > INDEPENDENT:
            span = torch.cat([span, (rest / rest.norm()).unsqueeze(0)])
            kept.append((concept, direction))
    # A stable order by concept, and no gap where a concept kept no direction of its own.
    kept.sort(key=lambda one: one[0])
    names = {concept: name for name, concept in enumerate(dict.fromkeys(concept for concept, _ in kept))}
    owner = torch.tensor([names[concept] for concept, _ in kept], dtype=torch.int64)
    basis = torch.stack([direction for _, direction in kept]) if kept else span
    return Subspaces(basis, owner)
