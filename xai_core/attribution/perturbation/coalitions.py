"""Parts as players: coalitions of them are shown, the others masked, and a linear rule gives part scores.

Both Kernel SHAP and LIME fit a weighted linear model whose design depends on the number of parts alone. The fit is
then one matrix a number of parts, and images with equally many parts share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from xai_core.attribution.interface import PartScores
from xai_core.attribution.perturbation.masking import (
    Scalar,
    ScoringOptions,
    behind_the_mask,
    blend,
    read_scores,
)
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts.labels import NO_PART


@dataclass(frozen=True)
class CoalitionOptions(ScoringOptions):
    """As for masking, and ``part_mean``: a masked part takes its own mean colour."""

    baselines: ClassVar[tuple[str, ...]] = ("mean", "black", "blur", "part_mean")

    baseline: Literal["mean", "black", "blur", "part_mean"] = "mean"  # type: ignore[assignment]


@dataclass(frozen=True)
class Design:
    """Coalitions of k parts and the linear map from their scores to part scores.

    ``coalitions`` ``[S, k]`` bool: which parts are shown; ``operator`` ``[k, S]`` float64.
    """

    coalitions: Tensor
    operator: Tensor


@dataclass(frozen=True)
class Players:
    """The parts of a batch without gaps: each image numbers those that it has.

    ``labels`` ``[B, H, W]`` int64, K where a pixel belongs to no part; ``present`` ``[B, K]`` says which of the
    caller's labels occur.
    """

    labels: Tensor
    present: Tensor

    @classmethod
    def of(cls, parts: Tensor, no_part: int = NO_PART) -> Players:
        """Players from part labels ``[B, H, W]``."""
        flat = parts.flatten(1).long()
        seen = torch.zeros(len(parts), no_part + 1, dtype=torch.bool, device=parts.device)
        seen.scatter_(1, flat, True)
        seen[:, no_part] = False
        present = seen[:, : int(seen.any(dim=0).nonzero().max()) + 1 if seen.any() else 0]
        number = torch.where(seen, seen.cumsum(dim=1) - 1, present.shape[1])
        return cls(number.gather(1, flat).view(parts.shape), present)

    @property
    def counts(self) -> Tensor:
        """How many parts each image has, ``[B]``."""
        return self.present.sum(dim=1)


def part_scores(
    method: str,
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    options: CoalitionOptions,
    design: Callable[[int], Design],
    batch_size: int,
) -> PartScores:
    """Scores of the target class for every part: what both part methods return.

    Raises:
        UsageError: labels of another shape than the images.
    """
    if parts.shape != images.shape[:1] + images.shape[-2:]:
        raise UsageError(
            f"{method}: expected part labels {(len(images), *images.shape[-2:])}, got {tuple(parts.shape)}"
        )
    players = Players.of(parts.to(images.device))
    scores = fit_coalitions(model, images, targets.view(-1, 1), players, options, design, batch_size)
    return PartScores(scores.squeeze(2))


def fit_coalitions(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    players: Players,
    options: CoalitionOptions,
    design: Callable[[int], Design],
    batch_size: int,
) -> Tensor:
    """Scores of parts for several classes, ``[B, K, C]`` float64, NaN where a part does not occur.

    Args:
        classes: ``[B, C]``, all read off the same passes; design: for a number of parts, asked once each.
    """
    behind = (
        part_means(images, players) if options.baseline == "part_mean" else behind_the_mask(model, images, options)
    )
    counts = players.counts
    sizes = [int(count) for count in counts.unique() if count > 0]
    designs = {size: _on(design(size), images.device) for size in sizes}
    owners = {size: (counts == size).nonzero().flatten() for size in sizes}
    table, first = _shown(designs, players.present.shape[1])
    scores = images.new_full((*players.present.shape, classes.shape[1]), torch.nan, dtype=torch.float64)
    if not sizes:
        return scores
    image = torch.cat([owners[size].repeat_interleave(len(designs[size].coalitions)) for size in sizes])
    row = torch.cat([first[size].repeat(len(owners[size])) for size in sizes])
    values = _play(model, images, behind, classes, players, table, image, row, options.scalar, batch_size)
    pieces = values.split([len(owners[size]) * len(designs[size].coalitions) for size in sizes])
    for size, piece in zip(sizes, pieces, strict=True):
        outcomes = piece.unflatten(0, (len(owners[size]), -1))
        fitted = torch.einsum("ks,bsc->bkc", designs[size].operator, outcomes)
        among = torch.zeros_like(players.present)
        among[owners[size]] = players.present[owners[size]]
        scores[among] = fitted.flatten(0, 1)
    return scores


def part_means(images: Tensor, players: Players) -> Tensor:
    """Each pixel's mean colour over its part, ``[B, 3, H, W]``; pixels of no part count as one part more."""
    labels = players.labels.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
    sums = images.new_zeros(*images.shape[:2], players.present.shape[1] + 1, dtype=torch.float64)
    areas = torch.zeros_like(sums)
    values = images.flatten(2).double()
    sums.scatter_add_(2, labels, values)
    areas.scatter_add_(2, labels, torch.ones_like(values))
    return (sums / areas.clamp(min=1)).gather(2, labels).view(images.shape).to(images.dtype)


def _on(design: Design, device: torch.device) -> Design:
    return Design(design.coalitions.to(device), design.operator.to(device))


def _shown(designs: dict[int, Design], width: int) -> tuple[Tensor, dict[int, Tensor]]:
    """All designs below each other, ``[rows, width + 1]``, and each design's rows.

    The last column is for pixels of no part. As in the metrics they go with the last part: they are masked where
    no part is shown.
    """
    rows, start, blocks = {}, 0, []
    for size, design in designs.items():
        coalitions = design.coalitions
        block = coalitions.new_zeros(len(coalitions), width + 1)
        block[:, :size] = coalitions
        block[:, width] = coalitions.any(dim=1)
        rows[size] = torch.arange(start, start + len(coalitions), device=coalitions.device)
        start += len(coalitions)
        blocks.append(block)
    return (torch.cat(blocks) if blocks else torch.zeros(0, width + 1, dtype=torch.bool)), rows


def _play(
    model: Classifier,
    images: Tensor,
    behind: Tensor,
    classes: Tensor,
    players: Players,
    table: Tensor,
    image: Tensor,
    row: Tensor,
    scalar: Scalar,
    batch_size: int,
) -> Tensor:
    """Scores ``[n, C]`` of flat (image, coalition) pairs."""

    def outcome(pairs: slice) -> Tensor:
        some = image[pairs]
        labels = players.labels[some]
        keep = table[row[pairs]].gather(1, labels.flatten(1)).view(labels.shape).unsqueeze(1)
        return read_scores(model, blend(images[some], behind[some], keep), classes[some], scalar)

    return torch.cat(run_batches(outcome, len(image), batch_size))
