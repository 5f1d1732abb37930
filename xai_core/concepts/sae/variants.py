"""What the variants differ in, as data: which latents fire, and what is minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xai_core.concepts.sae.options import (
    BatchTopKOptions,
    MatryoshkaOptions,
    SaeOptions,
    TopKOptions,
    TrainingOptions,
)


@dataclass(frozen=True)
class Variant:
    """A kind of sparse autoencoder; all trained on ``1/2 sum_m |x - x'_m|^2 + penalty |u|_1``, mean over a batch.

    ``floor`` gives the number that activations ``[B, K]`` have to exceed to fire, ``[B, 1]`` or ``[1, 1]``; None
    is ReLU. ``prefixes`` are the m, given K: x'_m comes from the first m latents alone. ``penalty`` and ``bias``,
    where b_e starts, are given C. ``selects`` names what the encoder of the dictionary needs beside ReLU: the mean
    floor as ``threshold``, or ``top_k``.
    """

    options: type[TrainingOptions]
    floor: Callable[[Tensor, Any], Tensor] | None
    selects: Literal["", "threshold", "top_k"] = ""
    prefixes: Callable[[Any, int], tuple[int, ...]] = field(default=lambda options, atoms: (atoms,))
    penalty: Callable[[Any, int], float] = field(default=lambda options, channels: 0.0)
    bias: Callable[[Any, int], float] = field(default=lambda options, channels: 0.0)


def next_largest(values: Tensor, k: int) -> Tensor:
    """The largest number of every row ``[R, n]`` after the k largest, but at least 0, ``[R, 1]``."""
    if k == values.shape[1]:
        return values.new_zeros(len(values), 1)
    if values.device.type != "cpu":
        return values.topk(k + 1, sorted=False).values.amin(dim=1, keepdim=True).clamp_min(0)
    # A fifth of the time that topk takes there.
    place = values.shape[1] - k - 1
    found = np.partition(values.numpy(), place, axis=1)[:, place : place + 1]
    return torch.from_numpy(found.copy()).clamp_min(0)


def _floor_of_vector(activations: Tensor, options: TopKOptions) -> Tensor:
    """Of every vector the k largest activations fire (Gao et al. 2024, section 2.3)."""
    return next_largest(activations, options.active(activations.shape[1]))


def _floor_of_batch(activations: Tensor, options: BatchTopKOptions) -> Tensor:
    """Of all activations of a batch the B k largest fire (Bussmann et al. 2024)."""
    return next_largest(activations.view(1, -1), len(activations) * options.active(activations.shape[1]))


def _l1(options: SaeOptions, channels: int) -> float:
    """Vectors have a norm of sqrt(C) on average: the LASSO's penalty is relative to that (iERF, equation 12)."""
    return options.l1 * float(channels**0.5)


def _nested(options: MatryoshkaOptions, atoms: int) -> tuple[int, ...]:
    return options.bounds(atoms)


VARIANTS: dict[str, Variant] = {
    # Encoder and bias start as one step of ISTA from codes of zero.
    "sae": Variant(SaeOptions, None, penalty=_l1, bias=lambda options, channels: -_l1(options, channels)),
    "sae_top_k": Variant(TopKOptions, _floor_of_vector, "top_k"),
    "sae_batch_top_k": Variant(BatchTopKOptions, _floor_of_batch, "threshold"),
    "sae_matryoshka": Variant(MatryoshkaOptions, _floor_of_batch, "threshold", prefixes=_nested),
}
