"""A layer's vectors as sums of concept vectors: where the graph's nodes and edges are read from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.concepts.coding import LASSO_PENALTY, encode
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.vectors import to_vectors
from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.precision import full_precision

NO_CONCEPT = -1


@dataclass(frozen=True)
class Decomposition:
    """Vectors of one layer as ``codes @ atoms + offset`` (iERF, equation 11, without the residual).

    ``codes`` ``[B, P, K]``, ``atoms`` ``[K, C]``, ``offset`` ``[C]``: zero but for an autoencoder's.
    """

    layer: str
    codes: Tensor
    atoms: Tensor
    offset: Tensor

    @property
    def spread(self) -> Tensor:
        """What the concepts put together, ``codes @ atoms``, ``[B, P, C]``: 0 where no concept is there."""
        with full_precision(self.codes.device):
            return self.codes @ self.atoms

    @property
    def active(self) -> Tensor:
        """Which concepts have a coefficient other than 0 anywhere in the image, bool ``[B, K]``."""
        return (self.codes != 0).any(dim=1)

    def chosen(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[B, P, Q]`` and atoms ``[B, Q, C]`` of some concepts of each image.

        Args:
            concepts: ``[B, Q]``; where it is :data:`NO_CONCEPT` the codes are 0.
        """
        there = concepts != NO_CONCEPT
        index = concepts.clamp(min=0)
        codes = self.codes.gather(2, index.unsqueeze(1).expand(-1, self.codes.shape[1], -1))
        return codes * there.unsqueeze(1), self.atoms[index]


def decompose(
    model: Classifier, activation: Tensor, layer: str, dictionary: Dictionary, *, penalty: float = LASSO_PENALTY
) -> Decomposition:
    """All vectors of a layer's output coded in its dictionary (iERF, section VI-A2, equations 11 and 12).

    On a vision transformer the prefix tokens are decomposed with the patches: without the class token a replayed
    network would miss what most of its decision goes through.

    Args:
        activation: the layer's output in its own layout; penalty: of the LASSO, see
            :func:`~xai_core.concepts.coding.encode`.

    Raises:
        UsageError: the output has no spatial positions, or the dictionary is of another width.
        NotFinite: a vector of some image is NaN or infinite.
    """
    vectors = wide(to_vectors(model, activation.detach(), layer))
    if dictionary.atoms.shape[1] != vectors.shape[2]:
        raise UsageError(
            f"layer {layer!r}: expected a dictionary of width {vectors.shape[2]} as the layer's vectors have, got "
            f"{dictionary.atoms.shape[1]}; use the one that was fitted on this layer of {model.spec.name}"
        )
    if not bool(vectors.isfinite().all()):
        raise NotFinite(f"layer {layer!r}: expected finite vectors, got NaN or infinity in some image")
    with torch.no_grad(), full_precision(vectors.device):
        codes = encode(dictionary, vectors.flatten(0, 1).float(), penalty=penalty)
    atoms = dictionary.atoms.to(vectors)
    offset = dictionary.encoder["offset"].to(vectors) if dictionary.encoder else torch.zeros_like(atoms[0])
    return Decomposition(layer, codes.to(vectors).unflatten(0, vectors.shape[:2]), atoms, offset)
