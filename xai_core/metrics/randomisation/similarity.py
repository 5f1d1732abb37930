"""How alike two maps of each image are, by the measures that sanity checks use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.metrics.correlation import pearson, spearman
from xai_core.metrics.structural_similarity import structural_similarity, unit_range

SimilarityName = Literal["spearman", "pearson", "cosine", "ssim"]
SIMILARITY_NAMES: tuple[SimilarityName, ...] = get_args(SimilarityName)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between vectors ``[B, n]``, in [-1, 1]: ``[B]`` float64; NaN where one is all zeros."""
    return (_direction(a) * _direction(b)).sum(dim=1).clamp(-1, 1)


def _direction(vectors: Tensor) -> Tensor:
    vectors = vectors.double()
    # Squares of tiny or huge numbers would leave the floats.
    return F.normalize(vectors / vectors.abs().amax(dim=1, keepdim=True), dim=1)


#: Of maps ``[B, H, W]`` with maps of the same size: ``[B]`` float64, 1 where they are alike.
SIMILARITIES: dict[SimilarityName, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": lambda a, b: spearman(a.flatten(1), b.flatten(1)),
    "pearson": lambda a, b: pearson(a.flatten(1), b.flatten(1)),
    "cosine": lambda a, b: cosine(a.flatten(1), b.flatten(1)),
    "ssim": lambda a, b: structural_similarity(unit_range(a), unit_range(b)),
}
