"""What a receptive field explains: scalars read from a layer's feature vectors, any number of them an image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from xai_core.arithmetic import ratio, wide
from xai_core.concepts.coding import encode
from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import UsageError

Pooling = Literal["max", "sum", "class_token"]
POOLINGS = ("max", "sum", "class_token")


class Scalars(Protocol):
    """N scalars z_k of a batch of images (iERF, equations 1 and 10).

    ``layer`` is where they are read; ``owner`` ``[N]`` says which image of the batch each belongs to, unsorted.
    """

    @property
    def layer(self) -> str:
        """Name of the module whose output is read."""

    @property
    def owner(self) -> Tensor:
        """Index of each scalar's image, ``[N]`` int64."""

    def __call__(self, vectors: Tensor, which: Tensor) -> Tensor:
        """The scalars ``which`` ``[n]``, each of its own vectors ``[n, P, C]``: ``[n]``, differentiable."""


@runtime_checkable
class Settling(Protocol):
    """Scalars that depend on the clean image beside the image they are read from."""

    def settled(self, vectors: Tensor, which: Tensor, prefix: int) -> Scalars:
        """The same scalars, those of ``which`` settled on their clean images' vectors ``[n, P, C]``.

        Args:
            prefix: how many of the P are class, distillation and register tokens.
        """


def settled(scalars: Scalars, vectors: Tensor, which: Tensor, prefix: int) -> Scalars:
    """The scalars with all fixed that the clean image decides; most have nothing of that kind."""
    return scalars.settled(vectors, which, prefix) if isinstance(scalars, Settling) else scalars


@dataclass(frozen=True)
class FeatureVectors:
    """How far a layer's vector at one place points along what it was: <v_p, v0> / |v0|, which is |v0| at first.

    ``position`` ``[N]``: where along the P vectors of the layer; ``vectors`` ``[N, C]``: the v0.
    """

    layer: str
    owner: Tensor
    position: Tensor
    vectors: Tensor

    def __call__(self, vectors: Tensor, which: Tensor) -> Tensor:
        """Lengths along the clean vectors, ``[n]``; 0 where the clean vector is zero."""
        clean = self.vectors[which.to(self.vectors.device)].to(vectors)
        if clean.shape[1] != vectors.shape[2]:
            raise UsageError(
                f"vectors: expected the {vectors.shape[2]} channels of layer {self.layer!r}, "
                f"got {clean.shape[1]}; pass vectors of that layer"
            )
        here = _at(vectors, self.position, which, self.layer)
        return ratio((here * clean).sum(1), clean.norm(dim=1))


@dataclass(frozen=True)
class Latents:
    """Codes of single atoms, pooled over an image's positions: see :func:`latents`.

    ``place`` ``[N]``: where each is read once it is settled; None before.
    """

    layer: str
    owner: Tensor
    dictionary: Dictionary
    latent: Tensor
    pooling: Pooling
    place: Tensor | None = None
    prefix: int | None = None

    def __call__(self, vectors: Tensor, which: Tensor) -> Tensor:
        """The latents ``which`` of vectors ``[n, P, C]``, ``[n]``.

        Raises:
            UsageError: a maximum or a sum that was not settled on the clean images (:meth:`settled`).
        """
        if self.pooling == "sum" and self.prefix is not None:
            return self.everywhere(vectors[:, self.prefix :], which).sum(1)
        if self.place is None:
            raise UsageError(
                f"latents: expected to know where the clean images have them (pooling {self.pooling!r}), got "
                "scalars that are not settled; call settled(vectors, which, prefix) with the clean images' vectors"
            )
        return self.everywhere(_at(vectors, self.place, which, self.layer).unsqueeze(1), which).squeeze(1)

    def settled(self, vectors: Tensor, which: Tensor, prefix: int) -> Latents:
        """Those of ``which`` fixed at the positions where the clean images' vectors ``[n, P, C]`` have most."""
        if self.pooling == "class_token" and not prefix:
            raise UsageError(
                f"pooling: expected a layer with a class token for 'class_token', got {self.layer!r} without one; "
                "use 'max' or 'sum'"
            )
        if self.pooling != "max":
            return dataclasses.replace(self, prefix=prefix)
        place = torch.zeros_like(self.latent) if self.place is None else self.place.clone()
        found = self.everywhere(vectors[:, prefix:].detach(), which).argmax(1) + prefix
        place[which.to(place.device)] = found.to(place.device)
        return dataclasses.replace(self, place=place, prefix=prefix)

    def everywhere(self, vectors: Tensor, which: Tensor) -> Tensor:
        """Codes of the latents ``which`` at each of their vectors ``[n, P, C]``, ``[n, P]``."""
        # Codes in the vectors' own type: an encoder computes in float32 at least.
        codes = encode(self.dictionary, vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        latent = self.latent[which.to(self.latent.device)].to(codes.device)
        return codes.gather(2, latent.view(-1, 1, 1).expand(-1, vectors.shape[1], 1)).squeeze(2).to(wide(vectors))


def feature_vectors(layer: str, owner: Tensor, position: Tensor, vectors: Tensor) -> FeatureVectors:
    """Scalars that stand for feature vectors: the projection of the vector at a place on its clean value.

    The paper's iERF of a feature vector (equation 2) has no scalar; this one has the vector's length as its value
    and leaves the vector's own direction as its gradient, so that SRD's map of it is equation 2 times that length.

    Args:
        owner: ``[N]``, the image of each; position: ``[N]`` among the layer's P vectors, prefix tokens first
            (:func:`~xai_core.concepts.vectors.to_vectors`); vectors: ``[N, C]``, the clean ones.

    Raises:
        UsageError: numbers of them that differ.
    """
    _expect_alike(owner, position=position)
    if vectors.ndim != 2 or len(vectors) != len(owner):
        raise UsageError(f"vectors: expected [{len(owner)}, C], one a scalar, got shape {tuple(vectors.shape)}")
    return FeatureVectors(layer, owner, position, vectors)


def latents(
    layer: str, owner: Tensor, dictionary: Dictionary, latent: Tensor, pooling: Pooling = "max"
) -> Latents:
    """Scalars that are latents z_k of a sparse autoencoder on a layer (iERF, equations 8 and 10).

    Args:
        owner: ``[N]``, the image of each; latent: ``[N]``, which atom each is.
        pooling: an image's z_k is that of the position where the clean image has its ``max``, the ``sum`` over all
            positions, or that of the ``class_token``. The first two leave out prefix tokens.

    Raises:
        UsageError: a dictionary whose codes come from the LASSO, which has no gradient; an unknown pooling;
            latents out of range; numbers of them that differ.
    """
    if not dictionary.encoder:
        raise UsageError(
            "dictionary: expected one with an encoder of its own, got one of "
            f"{dictionary.extractor or 'atoms'!r}, whose LASSO codes have no gradient; use a sparse autoencoder, "
            "or explain feature vectors"
        )
    if pooling not in POOLINGS:
        raise UsageError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    _expect_alike(owner, latent=latent)
    atoms = len(dictionary.atoms)
    if latent.numel() and not (int(latent.min()) >= 0 and int(latent.max()) < atoms):
        raise UsageError(f"latent: expected 0..{atoms - 1}, got {int(latent.min())}..{int(latent.max())}")
    place = torch.zeros_like(latent) if pooling == "class_token" else None
    return Latents(layer, owner, dictionary, latent, pooling, place)


def _expect_alike(owner: Tensor, **named: Tensor) -> None:
    for name, values in {"owner": owner, **named}.items():
        if values.ndim != 1 or len(values) != len(owner) or values.is_floating_point():
            raise UsageError(
                f"{name}: expected {len(owner)} whole numbers, one a scalar, got {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )


def _at(vectors: Tensor, position: Tensor, which: Tensor, layer: str) -> Tensor:
    """The vector ``[n, C]`` at each scalar's position of ``[n, P, C]``."""
    places = position[which.to(position.device)].to(vectors.device)
    if len(places) and not (int(places.min()) >= 0 and int(places.max()) < vectors.shape[1]):
        raise UsageError(
            f"position: expected 0..{vectors.shape[1] - 1} in layer {layer!r}, got "
            f"{int(places.min())}..{int(places.max())}"
        )
    return vectors[torch.arange(len(vectors), device=vectors.device), places]
