"""Bisecting k-means: concepts are centroids of clusters found by splitting in two, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import UsageError
from xai_core.registry import extractors

Strategy = Literal["biggest_inertia", "largest_cluster"]


@dataclass(frozen=True)
class BisectingKMeansOptions:
    """``bisecting_strategy``: which cluster is split next; ``n_init``: trials of each split."""

    bisecting_strategy: Strategy = "biggest_inertia"
    n_init: int = 1
    max_iter: int = 300

    def __post_init__(self) -> None:
        if self.bisecting_strategy not in get_args(Strategy):
            raise UsageError(
                f"bisecting_strategy: expected one of {', '.join(get_args(Strategy))}, "
                f"got {self.bisecting_strategy!r}"
            )
        if self.n_init < 1 or self.max_iter < 1:
            raise UsageError(f"n_init, max_iter: expected at least 1, got {self.n_init} and {self.max_iter}")


@extractors.register(
    "bisecting_kmeans",
    options=BisectingKMeansOptions,
    paper="iERF, sections VI-A1 and VII-E; Steinbach et al. 2000",
)
def bisecting_kmeans(vectors: Tensor, atoms: int, options: BisectingKMeansOptions, seed: int) -> Dictionary:
    """Centroids of bisecting k-means on the vectors as they are (iERF, section VII-E).

    Fewer than ``atoms`` come back where there are fewer distinct vectors.
    """
    from sklearn.cluster import BisectingKMeans

    points = vectors.double().cpu()
    clustering = BisectingKMeans(
        n_clusters=min(atoms, len(points.unique(dim=0))),
        bisecting_strategy=options.bisecting_strategy,
        n_init=options.n_init,
        max_iter=options.max_iter,
        random_state=seed,
    )
    labels = torch.from_numpy(clustering.fit(points.numpy()).labels_).long()
    centroids, sizes = member_means(points, labels)
    return Dictionary(atoms=centroids.float().to(vectors.device), sizes=sizes.to(vectors.device))


def member_means(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``[K, C]`` and sizes ``[K]`` of the clusters that have members.

    Computed from the labels, because the centres that an interrupted Lloyd iteration reports lag behind them.
    """
    _, compact, sizes = labels.unique(return_inverse=True, return_counts=True)
    sums = points.new_zeros(len(sizes), points.shape[1]).index_add(0, compact, points)
    return sums / sizes.unsqueeze(1), sizes
