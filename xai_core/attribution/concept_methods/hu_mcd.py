"""HU-MCD: parts scored by the concept subspaces that their features lie in, without a remainder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.attribution.concept_methods.segment_masking import (
    head_weights,
    linear_head,
    maskable,
    segment_features,
)
from xai_core.attribution.fitting import FitSamples
from xai_core.attribution.interface import PartScores
from xai_core.batching import run_batches
from xai_core.concepts.subspaces import Subspaces, completeness, decompose, find_subspaces
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts import part_areas, part_counts
from xai_core.registry import methods


@dataclass(frozen=True)
class HuMcdOptions:
    """Options of HU-MCD.

    ``fit_images``: images of a study whose parts the concepts are found in. ``concept_count``: clusters; by
    default the mean number of parts of an image plus its standard deviation. ``min_size``: members that make a
    cluster a concept. ``variance``: the share of a concept's variance that its subspace holds. ``sparsity``: how
    closely a feature is rebuilt from others, against how few these are.
    """

    fit_images: int = 64
    concept_count: int | None = None
    min_size: int = 5
    variance: float = 0.8
    sparsity: float = 50.0

    def __post_init__(self) -> None:
        for name in ("fit_images", "min_size", "concept_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"hu_mcd.{name}: expected at least 1, got {value}")
        if not 0 < self.variance <= 1:
            raise UsageError(f"hu_mcd.variance: expected a share above 0 and at most 1, got {self.variance}")
        if self.sparsity <= 1:
            raise UsageError(f"hu_mcd.sparsity: expected above 1 (there every code is zero), got {self.sparsity}")


@dataclass(frozen=True)
class SegmentRelevance:
    """What concepts add to a logit when one segment is seen alone.

    ``relevance`` ``[N, M]`` and ``complement`` ``[N]``, in logits: with the bias they add up to the logit of the
    masked image. ``activation`` ``[N, M]``: lengths of the features' components.
    """

    relevance: Tensor
    complement: Tensor
    activation: Tensor


def fit_hu_mcd(
    model: Classifier, samples: FitSamples, options: HuMcdOptions, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Concept subspaces of the features of all parts, each seen alone; ``completeness`` is that of each class."""
    parts = samples.parts
    if parts is None:
        raise UsageError("hu_mcd finds its concepts in parts: expected labels [N, H, W], got none")
    parts = parts.to(model.device)
    image, part = _segments(parts)

    def features(rows: slice) -> Tensor:
        pictures = samples.images[image[rows].to(samples.images.device)].to(model.device)
        return segment_features(model, pictures, parts[image[rows]] == part[rows, None, None])[0]

    if not len(image):
        raise UsageError("hu_mcd finds its concepts in parts: expected at least one, got labels without any")
    vectors = torch.cat(run_batches(features, len(image), batch_size))
    found = find_subspaces(
        vectors,
        concepts=options.concept_count or _usual_count(parts),
        sparsity=options.sparsity,
        variance=options.variance,
        min_size=options.min_size,
        seed=seed,
    )
    basis = found.basis.to(model.dtype)
    weights, _ = head_weights(model)
    shares = completeness(weights.cpu(), Subspaces(basis, found.owner))
    return {"basis": basis, "owner": found.owner, "completeness": shares}


@methods.register(
    "hu_mcd",
    options=HuMcdOptions,
    paper="Grobrügge et al. 2025, HU-MCD, after Vielhaben et al. 2023, MCD",
    equation="3 and 8 of MCD",
    needs=(linear_head, maskable),
    output="parts",
    cost="1 forward a part",
    gradient_free=True,
    fit=fit_hu_mcd,
)
def hu_mcd(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    options: HuMcdOptions,
    batch_size: int,
    *,
    fitted: Mapping[str, Tensor],
) -> PartScores:
    """HU-MCD: a part's score is the mean relevance, over the image's parts of its concept, of that concept.

    Terms: ``concept`` (the one in which the part's feature is longest), ``relevance`` (of this concept for this
    part), ``complement`` (what no concept holds). Without a single concept all scores are zero.
    """
    image, part = _segments(parts)
    subspaces = Subspaces(fitted["basis"], fitted["owner"])

    def relevance(rows: slice) -> SegmentRelevance:
        masks = parts[image[rows]] == part[rows, None, None]
        features, _ = segment_features(model, images[image[rows]], masks)
        return segment_relevance(features, head_weights(model)[0][targets[image[rows]]].to(features), subspaces)

    batches = run_batches(relevance, len(image), batch_size)
    table = _Table(image, part, len(images), int(part_counts(parts).max()) if len(parts) else 0)
    if not batches or not subspaces.count:
        zeros = images.new_zeros(len(image))
        own, complement = zeros, torch.cat([one.complement for one in batches]) if batches else zeros
        return PartScores(table(zeros), _terms(table, zeros, own, complement))
    activation = torch.cat([one.activation for one in batches])
    concept = activation.argmax(dim=1)
    own = torch.cat([one.relevance for one in batches]).gather(1, concept.unsqueeze(1)).squeeze(1)
    group = image * subspaces.count + concept
    totals = own.new_zeros(len(images) * subspaces.count).index_add(0, group, own)
    sizes = own.new_zeros(len(images) * subspaces.count).index_add(0, group, torch.ones_like(own))
    complement = torch.cat([one.complement for one in batches])
    return PartScores(table((totals / sizes)[group]), _terms(table, concept.to(own), own, complement))


def segment_relevance(features: Tensor, weights: Tensor, subspaces: Subspaces) -> SegmentRelevance:
    """A feature's components times the class's weight (MCD, equation 8): they add up to the logit less its bias.

    Args:
        features, weights: ``[N, C]``, a row of weights for each feature.
    """
    parts = decompose(features, subspaces)
    return SegmentRelevance(
        relevance=(parts.components * weights.unsqueeze(1)).sum(dim=2),
        complement=(parts.complement * weights).sum(dim=1),
        activation=parts.components.norm(dim=2),
    )


@dataclass(frozen=True)
class _Table:
    """Puts values of segments ``[N]`` where they belong, ``[B, K]``; NaN where there is no such part."""

    image: Tensor
    part: Tensor
    images: int
    parts: int

    def __call__(self, values: Tensor) -> Tensor:
        table = values.new_full((self.images, self.parts), torch.nan)
        table[self.image, self.part] = values
        return table


def _terms(table: _Table, concept: Tensor, own: Tensor, complement: Tensor) -> dict[str, Tensor]:
    return {"concept": table(concept), "relevance": table(own), "complement": table(complement)}


def _segments(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Image and name of every part that there is, ``[N]`` each."""
    count = int(part_counts(parts).max()) if len(parts) else 0
    image, part = (part_areas(parts, count) > 0).nonzero(as_tuple=True)
    return image, part


def _usual_count(parts: Tensor) -> int:
    """Mean plus standard deviation of the number of parts of an image, as the authors' code has it."""
    counts = part_counts(parts).double()
    return max(1, int(counts.mean() + counts.std(unbiased=False)))
