"""Dictionaries of concept vectors: how many atoms, which vectors, which extractor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.registry import ExtractorEntry, build_options, extractors

OVERCOMPLETENESS = 8
VECTORS_PER_ATOM = 4


@dataclass(frozen=True)
class Dictionary:
    """Concept vectors of one layer.

    ``atoms`` ``[K, C]`` float32; ``sizes`` ``[K]`` int64, how many of the fitted vectors use each atom (its
    members, or the vectors that it codes). ``encoder`` holds the tensors of an extractor that brings its own
    encoder; empty means that codes come from the LASSO. ``zero_vectors`` were left out of the fit.
    """

    atoms: Tensor
    sizes: Tensor
    encoder: Mapping[str, Tensor] = field(default_factory=dict)
    extractor: str = ""
    zero_vectors: int = 0

    def to(self, device: torch.device | str) -> Dictionary:
        """The same dictionary on a device."""
        return dataclasses.replace(
            self,
            atoms=self.atoms.to(device),
            sizes=self.sizes.to(device),
            encoder={name: tensor.to(device) for name, tensor in self.encoder.items()},
        )


def fit_dictionary(
    vectors: Tensor,
    *,
    extractor: str = "bisecting_kmeans",
    options: Any = None,
    atoms: int | None = None,
    seed: int = 0,
) -> Dictionary:
    """Concept vectors learned from PFVs by a registered extractor (iERF, section VI-A1).

    Vectors of zeros have no direction: they are left out and counted.

    Args:
        vectors: ``[N, C]``; an extractor that runs on a GPU does so where they lie.
        options: the extractor's options object, or a dict of them; defaults where None.
        atoms: K; by default 8 C as in the paper, but no more than a quarter of the non-zero vectors.

    Raises:
        UsageError: vectors that are not ``[N, C]``, not finite or fewer than two besides zeros, a number of
            atoms outside 1..N, an unknown extractor or option.
    """
    entry = extractors.get(extractor)
    chosen = _options(entry, options)
    usable = _usable(vectors)
    count = default_atoms(*usable.shape) if atoms is None else atoms
    if not 1 <= count <= len(usable):
        raise UsageError(
            f"atoms: expected 1 to {len(usable)} (the number of non-zero vectors), got {count}; "
            "sample more vectors or ask for fewer atoms"
        )
    found: Dictionary = entry.function(usable, count, chosen, seed)
    return dataclasses.replace(found, extractor=extractor, zero_vectors=len(vectors) - len(usable))


def default_atoms(vectors: int, channels: int) -> int:
    """K = 8 C (iERF, section VI-A1), held to four vectors an atom on average, at least 1."""
    return max(1, min(OVERCOMPLETENESS * channels, vectors // VECTORS_PER_ATOM))


def nonzero(vectors: Tensor) -> Tensor:
    """The vectors ``[M, C]`` that have a direction."""
    return vectors[vectors.any(dim=1)]


def _usable(vectors: Tensor) -> Tensor:
    if vectors.ndim != 2:
        raise UsageError(f"vectors: expected shape [N, C], got {tuple(vectors.shape)}; flatten the samples first")
    bad = int((~vectors.isfinite()).any(dim=1).sum())
    if bad:
        raise UsageError(
            f"vectors: expected finite numbers, got NaN or infinity in {bad} of {len(vectors)}; "
            "leave out the images that they come from"
        )
    usable = nonzero(vectors.detach().float())
    if len(usable) < 2:
        raise UsageError(
            f"vectors: expected at least 2 that are not all zero, got {len(usable)} of {len(vectors)}; "
            "sample more images, or a layer whose positions are active"
        )
    return usable


def _options(entry: ExtractorEntry, options: Any) -> Any:
    if isinstance(options, entry.options):
        return options
    return build_options(entry, options or {})
