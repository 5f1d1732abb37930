"""Passes that end behind a layer, and which of them N scalars need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.concepts.vectors import prefix, to_vectors
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.receptive_fields.scalars import Scalars, Settling, settled

# Scalars that share a row of a pass: one forward for so many backwards. More would save less than 1/16 of the work
# and leave a GPU with narrow passes.
SHARED = 8


def output_of(model: Classifier, images: Tensor, layer: str) -> Tensor:
    """A layer's output for images ``[B, 3, H, W]``; nothing behind the layer is computed.

    Raises:
        UsageError: an unknown layer, one that does not run, or one whose output is no single tensor.
    """

    def stop(_module: object, _inputs: object, output: Any) -> None:
        raise _Reached(output)

    handle = model.layer(layer).register_forward_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        output = reached.output
    else:
        raise UsageError(
            f"layer {layer!r}: expected a module that runs in the forward pass of {model.spec.name}, got one that "
            "does not; name the module around it"
        )
    finally:
        handle.remove()
    if not isinstance(output, Tensor):
        raise UsageError(
            f"layer {layer!r}: expected one tensor as its output, got {type(output).__name__}; "
            "name a layer inside it"
        )
    return output


class _Reached(Exception):  # noqa: N818
    """A pass came to the layer where it ends."""

    def __init__(self, output: Any) -> None:
        self.output = output


def rows_of(owner: Tensor) -> Tensor:
    """Scalars of one image side by side, ``[rows, at most SHARED]``, -1 where a row has no more.

    A row is an image in a pass, and its scalars are explained by one backward each. Rows come in the order of how
    many they hold, the fullest first, so that the scalars of one column always belong to the first rows.
    """
    owner = owner.cpu()
    order = owner.argsort(stable=True)
    counts = owner.bincount()
    counts = counts[counts > 0]
    rows_each = -(-counts // SHARED)
    image = torch.arange(len(counts)).repeat_interleave(rows_each)
    nth = torch.arange(len(image)) - (rows_each.cumsum(0) - rows_each)[image]
    # As even as can be: the rows of an image differ by one at most.
    smaller, larger = counts[image] // rows_each[image], counts[image] % rows_each[image]
    size = smaller + (nth < larger)
    first = size.cumsum(0) - size
    columns = torch.arange(int(size.max()) if len(size) else 0)
    inside = columns < size.unsqueeze(1)
    table = torch.where(inside, order[(first.unsqueeze(1) + columns).clamp(max=max(len(order) - 1, 0))], -1)
    return table[size.argsort(stable=True, descending=True)]


@dataclass(frozen=True)
class Reading:
    """The scalars of a pass: ``images`` ``[R, 3, H, W]``, one a row, and the ``table`` ``[R, T]`` of its scalars.

    As in :func:`rows_of`; ``layer`` is where all are read.
    """

    model: Classifier
    images: Tensor
    scalars: Scalars
    table: Tensor

    def all_columns(self) -> list[Tensor]:
        """The scalars ``[n]`` of each column: one for each of the first n rows."""
        return [column[column >= 0] for column in self.table.T]

    def vectors(self, output: Tensor) -> Tensor:
        """Feature vectors ``[R, P, C]`` of the layer's output.

        Raises:
            UsageError: the output has no spatial positions.
        """
        return to_vectors(self.model, output, self.scalars.layer)

    def settled(self, output: Tensor) -> Reading:
        """The same with every scalar settled on the clean images' output of the layer."""
        vectors, scalars = self.vectors(output.detach()), self.scalars
        for which in self.all_columns():
            scalars = settled(scalars, vectors[: len(which)], which, prefix(self.model, output))
        return Reading(self.model, self.images, scalars, self.table)

    def settled_on_images(self) -> Reading:
        """The same with every scalar settled by a pass of the clean images, where any needs to be."""
        if not isinstance(self.scalars, Settling):
            return self
        return self.settled(output_of(self.model, self.images, self.scalars.layer))

    def of(self, rows: Tensor) -> Reading:
        """The same scalars read from other images, each of which stands for one of the rows ``[n]``, ascending."""
        return Reading(self.model, self.images[rows], self.scalars, self.table[rows.to(self.table.device)])
