"""Sparse autoencoders: concepts are the decoder's rows, codes come from its encoder.

Importing this package registers the four variants as extractors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.sae.options import BatchTopKOptions, MatryoshkaOptions, SaeOptions, TopKOptions
from xai_core.concepts.sae.training import LogRow, Training
from xai_core.concepts.sae.variants import VARIANTS
from xai_core.registry import extractors

__all__ = ["VARIANTS", "LogRow", "Training", "sae", "sae_batch_top_k", "sae_matryoshka", "sae_top_k"]


@extractors.register(
    "sae",
    options=SaeOptions,
    paper="iERF, sections V and VI-A1; Bricken et al. 2023, Towards Monosemanticity",
)
def sae(vectors: Tensor, atoms: int, options: SaeOptions, seed: int) -> Dictionary:
    """Unit-norm decoder rows of a ReLU autoencoder with an L1 penalty (Bricken et al. 2023).

    Raises:
        UsageError: the training diverged.
    """
    return _fit("sae", vectors, atoms, options, seed)


@extractors.register(
    "sae_top_k",
    options=TopKOptions,
    paper="Gao et al. 2024, Scaling and evaluating sparse autoencoders",
)
def sae_top_k(vectors: Tensor, atoms: int, options: TopKOptions, seed: int) -> Dictionary:
    """Unit-norm decoder rows of an autoencoder whose k strongest latents code a vector (Gao et al. 2024).

    Raises:
        UsageError: more active latents than atoms, or the training diverged.
    """
    return _fit("sae_top_k", vectors, atoms, options, seed)


@extractors.register(
    "sae_batch_top_k",
    options=BatchTopKOptions,
    paper="Bussmann et al. 2024, BatchTopK Sparse Autoencoders",
)
def sae_batch_top_k(vectors: Tensor, atoms: int, options: BatchTopKOptions, seed: int) -> Dictionary:
    """Unit-norm decoder rows of an autoencoder with k latents a vector on average (Bussmann et al. 2024).

    Raises:
        UsageError: more active latents than atoms, or the training diverged.
    """
    return _fit("sae_batch_top_k", vectors, atoms, options, seed)


@extractors.register(
    "sae_matryoshka",
    options=MatryoshkaOptions,
    paper="iERF, section V-C; Bussmann et al. 2025, Learning Multi-Level Features with Matryoshka SAEs",
)
def sae_matryoshka(vectors: Tensor, atoms: int, options: MatryoshkaOptions, seed: int) -> Dictionary:
    """Unit-norm decoder rows of nested BatchTopK autoencoders, general concepts first (Bussmann et al. 2025).

    Raises:
        UsageError: more active latents than atoms, or the training diverged.
    """
    return _fit("sae_matryoshka", vectors, atoms, options, seed)


def _fit(extractor: str, vectors: Tensor, atoms: int, options: Any, seed: int) -> Dictionary:
    training = Training(
        [vectors], extractor=extractor, options=options, atoms=atoms, seed=seed, device=vectors.device
    )
    training.advance()
    return training.dictionary()
