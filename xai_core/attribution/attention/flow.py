"""What methods over attention share: the rows that the head reads, products of matrices, bounded groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attention import blocks_of, readout
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier


def carry_back(rows: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """Rows ``[n, T]`` or ``[B, n, T]`` times matrices ``[B, T, T]``, the last block's first: ``[B, n, T]``.

    Only the rows that the head reads are multiplied, never one matrix by another.
    """
    for matrix in matrices:
        rows = rows @ matrix
    return rows


def read_rows(model: Classifier) -> tuple[Tensor, Tensor]:
    """Positions of the tokens that the head reads and the weight of each, ``[n]`` and ``[n]``."""
    weights = readout(model)
    positions = weights.nonzero().flatten()
    return positions, weights[positions]


def mean_heads(attention: Tensor) -> Tensor:
    """Attention ``[B, heads, T, T]`` averaged over heads, wide."""
    return wide(attention).mean(dim=1)


def in_groups(
    function: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    classes: Tensor,
    rows: int,
    tokens: int,
    batch_size: int,
) -> Tensor:
    """``function(images, classes)`` of groups so small that their rows take no more than a batch's attention.

    A head that pools all tokens needs ``rows = tokens`` rows for each image and class; a class token, one.
    """
    most = max(1, batch_size * tokens // rows)

    def run(chunk: Tensor) -> Tensor:
        return torch.cat(
            run_batches(
                lambda group: function(images[group], chunk[group]), len(images), max(1, most // chunk.shape[1])
            )
        )

    return torch.cat([run(chunk) for chunk in classes.split(most, dim=1)], dim=1)


def start_of(model: Classifier, start_layer: int | None, share: int) -> int:
    """The first block to read: as told, or after a ``share``-th of the blocks."""
    return len(blocks_of(model)) // share if start_layer is None else start_layer


def start_within(model: Classifier, options: Any) -> str | None:
    """A block of the number that the option ``start_layer`` names."""
    depth = len(blocks_of(model))
    if options.start_layer is not None and options.start_layer >= depth:
        return f"start_layer={options.start_layer} is behind its last block: expected 0..{depth - 1}"
    return None


def check_start(method: str, start_layer: int | None) -> None:
    """Refuses a negative block number.

    Raises:
        UsageError: naming the option.
    """
    if start_layer is not None and start_layer < 0:
        raise UsageError(f"{method}.start_layer: expected a block from 0, got {start_layer}")
