"""What coefficients of concepts are attributed for: alignment with concepts of a later layer, or logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.concepts.graph.decomposition import Decomposition
from xai_core.concepts.vectors import from_vectors, to_vectors
from xai_core.models import Classifier
from xai_core.precision import full_precision
from xai_core.replay import Between


class Question(Protocol):
    """Scores of ``count`` targets an image as a function of the vectors of the layer ``source``."""

    @property
    def model(self) -> Classifier:
        """The network."""

    @property
    def source(self) -> Decomposition:
        """The layer whose coefficients are attributed."""

    @property
    def count(self) -> int:
        """Targets an image, T."""

    def scores(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """Scores ``[n, T]`` from vectors ``[n, P, C]`` of the images ``owners`` ``[n]``; differentiable."""


@dataclass(frozen=True)
class Alignment:
    """The concept alignment score of concepts of a later layer (iERF, equation 13).

    Args:
        between: the network from the source to the later layer; target: that layer's decomposition of the images
            as they are; concepts: ``[B, T]``.
    """

    model: Classifier
    source: Decomposition
    between: Between
    target: Decomposition
    concepts: Tensor

    @property
    def count(self) -> int:
        """Targets an image, T."""
        return self.concepts.shape[1]

    def scores(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """S = sum over i of u_it cos(x~_i, v_t), of all targets from one pass, ``[n, T]``."""
        weights, directions = self.target.chosen(self.concepts)
        with full_precision(vectors.device):
            pooled = torch.einsum("npt,npc->ntc", weights[owners], self._arrived(vectors, owners))
            return (pooled * unit(directions)[owners]).sum(dim=2)

    def largest_cosines(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """The maximum over positions of cos(x~_i, v_t) of every target, ``[n, T]`` (section VI-C1)."""
        _, directions = self.target.chosen(self.concepts)
        with full_precision(vectors.device):
            cosines = self._arrived(vectors, owners) @ unit(directions)[owners].transpose(1, 2)
            return cosines.amax(dim=1)

    def _arrived(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """What the network makes of the vectors, as unit vectors ``[n, P, C]``."""
        reached = _through(self, vectors, owners)
        return unit(wide(to_vectors(self.model, reached, self.target.layer)))


@dataclass(frozen=True)
class Logits:
    """Logits of the classes ``[B, M]`` of each image.

    Args:
        between: the network from the source to the logits.
    """

    model: Classifier
    source: Decomposition
    between: Between
    classes: Tensor

    @property
    def count(self) -> int:
        """Classes an image, M."""
        return self.classes.shape[1]

    def scores(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """The logits of each row's classes, ``[n, M]``."""
        return wide(_through(self, vectors, owners)).gather(1, self.classes[owners])


def _through(question: Alignment | Logits, vectors: Tensor, owners: Tensor) -> Tensor:
    """What the network between makes of vectors ``[n, P, C]``."""
    between = question.between
    return between.run(from_vectors(question.model, vectors, between.activation), owners)


def unit(vectors: Tensor) -> Tensor:
    """Vectors over their lengths; a vector of zeros stays, and has the derivative 0."""
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, torch.inf)
