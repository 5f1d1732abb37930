"""Grid pointing game: relevance in the right cell of a mosaic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.localisation.mosaics import Mosaics, arrange, join_labels, shrink, shrink_labels
from xai_core.metrics.localisation.overlap import (
    OVERLAPS,
    OverlapOptions,
    blurred,
    mark,
    no_relevance,
    positive_part,
    share_inside,
)
from xai_core.metrics.localisation.regions import Region, true_mask
from xai_core.metrics.measured import Measured
from xai_core.metrics.shapeless import not_finite
from xai_core.metrics.truth import INSIDE, UNKNOWN
from xai_core.parts.labels import MOST_PARTS
from xai_core.registry import metrics

GridRegion = Literal["cell", "object"]
Score = Literal["share", "region_attribution", "iou", "precision", "recall", "f1"]


@dataclass(frozen=True)
class GridPointingGameOptions:
    """``side`` n: a mosaic has n x n cells. ``confidence``: the least probability of an image's own target.

    ``region``: the image's whole ``cell`` (VAR's Quad) or the ``object`` inside it (its Part-Quad, which needs
    masks). ``score``: how a map is compared with the region; ``share`` is the paper's, the others are the metrics
    of that name with their defaults. ``seed``: which images stand together, and where.
    """

    side: int = 2
    confidence: float = 0.5
    region: GridRegion = "cell"
    score: Score = "share"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side < 2:
            raise UsageError(f"side: expected at least 2 cells, got {self.side}")
        if not 0 <= self.confidence <= 1:
            raise UsageError(f"confidence: expected a probability, got {self.confidence}")
        for name, known in (("region", REGIONS), ("score", SCORES)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Game:
    """Mosaics and what a method said of them.

    ``maps`` ``[M, cells, H, W]``: of each cell's class; NaN where ``crowded`` ``[M]``: too many parts to explain.
    ``confident`` ``[B]``: the images that were eligible.
    """

    mosaics: Mosaics
    maps: Tensor
    crowded: Tensor
    confident: Tensor


@metrics.register(
    "grid_pointing_game",
    options=GridPointingGameOptions,
    paper="Boehle et al. 2021, CoDA Networks; Rao et al. 2022; VAR 4.1 (Quad-ImageNet, Part-Quad-ImageNet)",
    family="localisation",
    needs=("explainer",),
    also_needs=lambda options: ("mask",) if options.region == "object" else (),
    definition="four images of distinct targets, each with p(target) >= confidence, are shrunk (bilinear, "
    "antialiased) into the 2 x 2 cells of one picture of the model's input size, which the method explains for "
    "each of the four targets; an image's value is the share of its target's max(map, 0) that lies in its cell. "
    "Chance is 1/4: what a map that is the same for all classes scores on average over a mosaic, and a positive "
    "constant map on every image. region=object: its object's pixels in its cell, unknown ones there left out. "
    "Mosaics are put together within a shard, every image in at most one: a value depends on the shard, but not "
    "on the batch size",
    higher_is_better=True,
    unit="share of relevance",
    undefined="null where the model is not confident in the target, too few images of other classes are left for "
    "a mosaic, the mosaic has more than 254 parts (part methods), its map is not finite or has no positive "
    "relevance, or the object's mask is empty in it (region=object)",
    cost="1 explanation: those of a mosaic's classes, shared by its images",
)
def grid_pointing_game(evidence: Evidence, options: GridPointingGameOptions) -> Measured:
    """Grid pointing game: the share of positive relevance in the cell that shows the explained class."""
    game = evidence.once(
        ("grid pointing game", options.side, options.confidence, options.seed), lambda: _play(evidence, options)
    )
    maps = game.maps.flatten(0, 1)
    region = REGIONS[options.region](evidence, game.mosaics)
    relevance = positive_part(maps)
    scores = SCORES[options.score](relevance, region)
    reasons = {
        f"the mosaic has more than {MOST_PARTS} parts": game.crowded.repeat_interleave(options.side**2),
        **not_finite(maps),
        **region.undefined,
        **no_relevance(relevance, region),
    }

    def per_image(values: Tensor, missing: float | bool) -> Tensor:
        return game.mosaics.per_image(values.view(game.mosaics.members.shape), len(evidence), missing)

    grouped = per_image(torch.ones_like(scores, dtype=torch.bool), missing=False)
    return Measured(
        per_image(scores, torch.nan),
        {
            "the model is not confident in the target": ~game.confident,
            "too few images of other classes are left": ~grouped,
            **{reason: per_image(where, missing=False) for reason, where in reasons.items()},
        },
    )


def _play(evidence: Evidence, options: GridPointingGameOptions) -> Game:
    """Puts mosaics together and asks the method about each of their classes."""
    explainer = evidence.method
    images = evidence.images
    confident = evidence.clean >= options.confidence
    mosaics = arrange(confident, evidence.targets, images.shape[-2:], options.side, options.seed)
    members = mosaics.members
    maps = images.new_full((*members.shape, *images.shape[-2:]), torch.nan, dtype=torch.float32)
    crowded = torch.zeros(len(members), dtype=torch.bool, device=images.device)
    parts = None
    if explainer.entry.output == "parts":
        parts, crowded = _joined_parts(evidence, mosaics)
        parts = parts[~crowded]
    if not bool(crowded.all()):
        pictures = mosaics.assemble(lambda rows, size: shrink(images[rows], size))[~crowded]
        maps[~crowded] = explainer.class_maps(evidence.model, pictures, evidence.targets[members][~crowded], parts)
    return Game(mosaics, maps, crowded, confident)


def _joined_parts(evidence: Evidence, mosaics: Mosaics) -> tuple[Tensor, Tensor]:
    """The images' parts in their cells ``[M, H, W]``, and which mosaics have more than can be named ``[M]``."""
    labels = mosaics.assemble(lambda rows, size: shrink_labels(evidence.labels[rows], size))
    joined, count = join_labels(labels, mosaics.cells)
    return joined, count > MOST_PARTS


def _whole_cells(evidence: Evidence, mosaics: Mosaics) -> Region:
    """Each image's cell of its mosaic against the others, ``[M * cells, H, W]``."""
    inside = _own_cells(mosaics)
    return Region(inside, ~inside)


def _objects(evidence: Evidence, mosaics: Mosaics) -> Region:
    """The object in each image's cell against the rest of the mosaic, ``[M * cells, H, W]``."""
    masks = true_mask(evidence)
    mask = mosaics.assemble(lambda rows, size: shrink_labels(masks[rows], size))
    mask = mask.repeat_interleave(mosaics.members.shape[1], dim=0)
    own = _own_cells(mosaics)
    inside = own & (mask == INSIDE)
    return Region(inside, ~inside & ~(own & (mask == UNKNOWN)))


def _own_cells(mosaics: Mosaics) -> Tensor:
    count, cells = mosaics.members.shape
    numbers = torch.arange(cells, device=mosaics.members.device).view(-1, 1, 1)
    return (mosaics.cells == numbers).repeat(count, 1, 1)


def _share_after_blur(relevance: Tensor, region: Region) -> Tensor:
    return share_inside(blurred(relevance, OverlapOptions.kernel, OverlapOptions.sigma), region)


def _overlap_after_blur(name: str) -> Callable[[Tensor, Region], Tensor]:
    def score(relevance: Tensor, region: Region) -> Tensor:
        smooth = blurred(relevance, OverlapOptions.kernel, OverlapOptions.sigma)
        return OVERLAPS[name](mark(smooth, region, OverlapOptions.threshold))

    return score


REGIONS: dict[str, Callable[[Evidence, Mosaics], Region]] = {"cell": _whole_cells, "object": _objects}
SCORES: dict[str, Callable[[Tensor, Region], Tensor]] = {
    "share": share_inside,
    "region_attribution": _share_after_blur,
    **{name: _overlap_after_blur(name) for name in OVERLAPS},
}
