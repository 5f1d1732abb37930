"""Exemplars of concepts: the sampled vectors nearest to each, found in one stream over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.coding import encode
from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import UsageError

NONE = torch.iinfo(torch.int64).min
_NUMBERS = 2**32
_SIGN = 2**31 - 1
# Scores that are held at once.
_CHUNK = 2**21


def concept_scores(dictionary: Dictionary, vectors: Tensor) -> Tensor:
    """How near vectors ``[N, C]`` are to each concept, ``[N, K]`` float32; -inf where a vector is no exemplar.

    A dictionary of vectors alone (k-means, dictionary learning): the cosine, since a concept is a direction
    (iERF, section VI-D: nearest embeddings); vectors and atoms of zeros have none. One with an encoder: the code,
    where it is positive, since what fires a latent is its encoder's affair and not the decoder row's.
    """
    if dictionary.encoder:
        codes = encode(dictionary, vectors)
        return torch.where(codes > 0, codes, -torch.inf)
    # In float64, so that blocks of another size round to the same score.
    atoms, points = dictionary.atoms.to(vectors.device).double(), vectors.double()
    cosine = (F.normalize(points, dim=1) @ F.normalize(atoms, dim=1).T).float()
    return cosine.masked_fill(~points.any(dim=1, keepdim=True) | ~atoms.any(dim=1), -torch.inf)


@dataclass(frozen=True)
class Exemplars:
    """The best vectors of each concept, nearest first, ``[K, count]`` each.

    ``image`` and ``draw`` (which of the image's vectors) are -1 and ``score`` is -inf past a concept's last.
    """

    score: Tensor
    image: Tensor
    draw: Tensor


class ExemplarSearch:
    """The ``count`` nearest vectors of each concept, of vectors that come shard by shard.

    Which they are depends neither on the order nor on the size of the shards: of equal scores the smaller image,
    then the smaller draw, comes first. Memory does not grow with the number of vectors.
    """

    def __init__(self, dictionary: Dictionary, count: int, *, distinct_images: bool = True) -> None:
        """``distinct_images``: at most one exemplar an image, its nearest, so that they show variety."""
        if count < 1:
            raise UsageError(f"count: expected at least 1 exemplar a concept, got {count}")
        self._dictionary = dictionary
        self._count = count
        self._distinct = distinct_images
        self._draws = 0
        self._keys = torch.full((len(dictionary.atoms), 0), NONE)

    def add(self, vectors: Tensor, images: Tensor) -> None:
        """Takes the vectors ``[I, n, C]`` of some images, numbered ``[I]``; an image comes in one call only."""
        if vectors.ndim != 3 or images.shape != vectors.shape[:1]:
            raise UsageError(
                "expected vectors [I, n, C] and the number of each image [I], got "
                f"{tuple(vectors.shape)} and {tuple(images.shape)}"
            )
        if not len(vectors):
            return
        if int(images.min()) < 0 or (int(images.max()) + 1) * vectors.shape[1] > _NUMBERS:
            raise UsageError(
                f"images: expected numbers from 0, times {vectors.shape[1]} vectors each below {_NUMBERS}, got "
                f"{int(images.min())}..{int(images.max())}"
            )
        if self._draws not in (0, vectors.shape[1]):
            raise UsageError(f"vectors: expected {self._draws} an image as before, got {vectors.shape[1]}")
        self._draws = vectors.shape[1]
        step = max(1, _CHUNK // max(1, self._draws * len(self._dictionary.atoms)))
        for some, numbers in zip(vectors.split(step), images.split(step), strict=True):
            self._add(some, numbers.to(vectors.device))

    def _add(self, vectors: Tensor, images: Tensor) -> None:
        draws = torch.arange(self._draws, device=vectors.device)
        number = images.view(-1, 1) * self._draws + draws
        scores = concept_scores(self._dictionary, vectors.flatten(0, 1)).view(
            *vectors.shape[:2], len(self._dictionary.atoms)
        )
        keys = _keys(scores, number.unsqueeze(-1))
        best = (keys.amax(dim=1) if self._distinct else keys.flatten(0, 1)).T
        known = torch.cat([self._keys.to(best.device), best], dim=1)
        self._keys = known.topk(min(self._count, known.shape[1]), dim=1).values

    def found(self) -> Exemplars:
        """The exemplars of all vectors so far."""
        missing = self._count - self._keys.shape[1]
        keys = F.pad(self._keys, (0, missing), value=NONE) if missing else self._keys
        none, draws = keys == NONE, max(1, self._draws)
        number = _NUMBERS - 1 - keys.remainder(_NUMBERS)
        return Exemplars(
            score=_score(keys).masked_fill(none, -torch.inf),
            image=(number // draws).masked_fill(none, -1),
            draw=(number % draws).masked_fill(none, -1),
        )


def _keys(scores: Tensor, number: Tensor) -> Tensor:
    """One integer for a score and the number of its vector, larger for nearer: no two of them tie.

    The bits of a float32 order as integers do, but for negative numbers, which order the other way round.
    """
    bits = (scores + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ _SIGN, bits).long()
    keys = order * _NUMBERS + (_NUMBERS - 1 - number)
    return torch.where(scores == -torch.inf, NONE, keys)


def _score(keys: Tensor) -> Tensor:
    """The scores in keys."""
    order = keys.div(_NUMBERS, rounding_mode="floor").int()
    return torch.where(order < 0, order ^ _SIGN, order).view(torch.float32)
