"""What a parser gets to see of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ParserInput:
    """A batch of images and whatever else the parser said in ``needs`` that it reads.

    A parser is a function ``(ParserInput, options) -> int64 array [B, H, W]``: any non-negative labels
    below ``NO_PART``, and ``NO_PART`` where there is no part. Merging and renaming are not its business.

    Attributes:
        images: normalised model inputs ``[B, 3, H, W]``.
        pictures: the same in [0, 1], float32 ``[B, H, W, 3]``.
        features: unit vectors ``[B, rows, columns, D]``, or None for a parser that does not need them.
        masks: integers ``[B, H, W]``, or None for a parser that does not need them.
        k: number of parts asked for.
        seed: of everything random.
    """

    images: Tensor
    pictures: np.ndarray
    features: np.ndarray | None
    masks: np.ndarray | None
    k: int
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        _, _, height, width = self.images.shape
        return height, width
