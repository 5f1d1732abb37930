"""Rank stability: does noise reorder the parts?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.correlation import spearman
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.robustness.noise import Neighbours, NoiseOptions, explain_neighbours
from xai_core.registry import metrics, refuse_unread

Similarity = Literal["spearman", "top_jaccard"]


@dataclass(frozen=True)
class RankStabilityOptions(NoiseOptions):
    """As for all noise, and how rankings are compared.

    ``sigma``: the noise's standard deviation, of pixel values in [0, 1]; ``similarity``: ``spearman`` compares the
    scores of all parts, ``top_jaccard`` the sets of the ``top`` highest.
    """

    sigma: float = 0.05
    similarity: Similarity = "spearman"
    top: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise UsageError(f"sigma: expected a standard deviation > 0, got {self.sigma}")
        if self.similarity not in get_args(Similarity):
            raise UsageError(
                f"similarity: expected one of {', '.join(get_args(Similarity))}, got {self.similarity!r}"
            )
        if self.top < 1:
            raise UsageError(f"top: expected at least 1, got {self.top}")
        if self.similarity != "top_jaccard":
            refuse_unread(self, f"with similarity {self.similarity!r}", "top")


@metrics.register(
    "rank_stability",
    options=RankStabilityOptions,
    paper="KL-Hessian 5.1.2",
    family="robustness",
    needs=("parts", "explainer"),
    definition="mean over noisy copies of the similarity of the parts' scores with the clean image's: Spearman's "
    "correlation (ties share their mean rank), or the Jaccard index of the top parts (ties in label order); "
    "Gaussian noise of sigma is added to pixel values in [0, 1], which are then clamped there; the clean image's "
    "parts are scored, a pixel map by its mean inside each; copies with another top 1 are left out",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="correlation, or Jaccard index",
    undefined="null where fewer than two parts exist or all score the same, on the clean image or a noisy copy; "
    "where a map is not finite; where the prediction flips on every noisy copy; for top_jaccard, where there are "
    "no more parts than it takes",
    cost="samples x (forward + explanation)",
)
def rank_stability(evidence: Evidence, options: RankStabilityOptions) -> Measured:
    """Rank stability: how far noise leaves the order of the parts as it is."""
    clean, neighbours = evidence.scores.unsqueeze(1), _scores_under_noise(evidence, options)
    present = ~clean.isnan()
    noisy = torch.where(present, neighbours.values, torch.nan)
    reasons = {**evidence.unranked("parts"), **neighbours.undefined}
    # Spearman's correlation is undefined for a copy whose parts all score the same, and so is their top.
    correlation = spearman(clean, noisy, present)
    reasons["all parts of a noisy copy score the same"] = (correlation.isnan() & neighbours.kept).any(dim=1)
    if options.similarity == "spearman":
        return Measured(neighbours.mean(correlation), reasons)
    reasons["no more parts than the top takes"] = present.sum(dim=2).squeeze(1) <= options.top
    return Measured(neighbours.mean(top_jaccard(clean, noisy, options.top)), reasons)


def top_jaccard(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Jaccard index of the ``count`` highest entries of ``a`` and of ``b``, ``[..., K]``: ``[...]`` float64.

    Ties fall in index order; NaN stands behind all numbers.
    """
    shared = (_is_top(a, count) & _is_top(b, count)).sum(dim=-1).double()
    return shared / (2 * count - shared)


def _is_top(values: Tensor, count: int) -> Tensor:
    order = values.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter_(-1, order[..., :count], True)


def _scores_under_noise(evidence: Evidence, options: RankStabilityOptions) -> Neighbours:
    """Scores ``[B, samples, K]`` of the clean images' parts on noisy copies; all similarities share them.

    Parts that an image does not have score 0, so that a number that is not finite is the method's doing.
    """
    model, labels, count = evidence.model, evidence.labels, evidence.scores.shape[1]

    def move(images: Tensor, noise: Tensor) -> Tensor:
        return model.normalise((model.denormalise(images) + options.sigma * noise).clamp(0, 1))

    def read(copies: Tensor, owner: Tensor) -> Tensor:
        scores = evidence.method.scores(model, copies, evidence.targets[owner], labels[owner])
        # The copies of a stretch may have fewer parts than other images.
        scores = F.pad(scores, (0, count - scores.shape[1]), value=torch.nan)
        return torch.where(evidence.scores[owner].isnan(), 0.0, scores)

    key = ("scores under noise", options.sigma, options.samples, options.seed)
    return evidence.once(key, lambda: explain_neighbours(evidence, options, move, read, width=count))
