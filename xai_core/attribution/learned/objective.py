"""What an explainer is trained for: deletion area minus insertion area, along the relaxed order of its own map."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor, nn

from xai_core.attribution.learned.decoder import LARGEST_GRID, DecoderConfig, LearnedExplainer, map_size
from xai_core.attribution.learned.sinkhorn import relaxed_order, straight_through, with_gumbel_noise
from xai_core.attribution.learned.trajectory import Term, areas, hard_shares, make_scene, shares, strata
from xai_core.baselines import Baseline, BaselineKind
from xai_core.errors import UsageError
from xai_core.precision import full_precision

Ranking = Literal["map", "cells"]
Target = Literal["top1", "label"]


@dataclass(frozen=True)
class AreaOptions:
    """How a map is ranked, and along which trajectories it is judged.

    ``ranking``: ``map`` ranks every place of the map, in as many portions as there are steps; ``cells`` is a full
    permutation of ``cells`` x ``cells`` means of the map. ``steps`` T of a trajectory. ``temperature``,
    ``final_temperature``: of the relaxed order at the start and at the end, falling geometrically; ``iterations``:
    Sinkhorn's, before Newton's steps; ``noise``: scale of the Gumbel noise at the start, falling to 0 linearly;
    ``straight_through``: the pictures follow the hard order, the gradient the relaxed one. ``deletion`` and
    ``insertion``: their baselines; ``sigma`` of blur. ``negative_order``: least relevant first as well, reversed;
    new only where the baselines differ.
    """

    ranking: Ranking = "map"
    cells: int = 14
    steps: int = 8
    temperature: float = 0.3
    final_temperature: float = 0.03
    iterations: int = 5
    noise: float = 0.1
    straight_through: bool = False
    deletion: BaselineKind = "blur"
    insertion: BaselineKind = "blur"
    sigma: float = 11.0
    negative_order: bool = False

    def __post_init__(self) -> None:
        if self.ranking not in get_args(Ranking):
            raise UsageError(f"aha.ranking: expected map or cells, got {self.ranking!r}")
        if not 2 <= self.cells <= LARGEST_GRID:
            raise UsageError(f"aha.cells: expected 2 to {LARGEST_GRID} a side, got {self.cells}")
        if self.ranking == "map" and self.cells != AreaOptions.cells:
            raise UsageError("aha.cells: nothing reads it with ranking map; leave it out, or set ranking: cells")
        if self.steps < 2:
            raise UsageError(f"aha.steps: expected at least 2, got {self.steps}")
        if not 0 < self.final_temperature <= self.temperature:
            raise UsageError(
                "aha.temperature: expected 0 < final_temperature <= temperature, "
                f"got {self.final_temperature} and {self.temperature}"
            )
        if self.iterations < 1:
            raise UsageError(f"aha.iterations: expected at least 1, got {self.iterations}")
        if self.noise < 0 or self.sigma <= 0:
            raise UsageError(f"aha: expected noise >= 0 and sigma > 0, got {self.noise} and {self.sigma}")
        for name in ("deletion", "insertion"):
            if getattr(self, name) not in get_args(BaselineKind):
                raise UsageError(
                    f"aha.{name}: expected {', '.join(get_args(BaselineKind))}, got {getattr(self, name)!r}"
                )
        if self.sigma != AreaOptions.sigma and "blur" not in (self.deletion, self.insertion):
            raise UsageError("aha.sigma: nothing reads it without the baseline blur; leave it out")
        if self.negative_order and self.deletion == self.insertion:
            raise UsageError(
                "aha.negative_order: with one baseline least relevant first is the positive order read backwards, "
                "and would only double the loss; give deletion and insertion different baselines, or leave it out"
            )

    @property
    def terms(self) -> tuple[Term, ...]:
        """The areas of the loss: deletion, to fall, and insertion, to rise; the same of the other baseline.

        Deleting the least relevant first passes the pictures of an insertion over the same baseline, backwards:
        its area, which is to rise, is that insertion's.
        """
        deletion, insertion = (self._baseline(kind) for kind in (self.deletion, self.insertion))
        positive = (Term("image", deletion, 1.0), Term("baseline", insertion, -1.0))
        negative = (Term("image", insertion, 1.0), Term("baseline", deletion, -1.0))
        return (*positive, *negative) if self.negative_order else positive

    def _baseline(self, kind: BaselineKind) -> Baseline:
        return Baseline(kind, self.sigma) if kind == "blur" else Baseline(kind)

    def temperature_at(self, progress: float) -> float:
        """The temperature when this share of all steps is done."""
        return self.temperature * (self.final_temperature / self.temperature) ** progress

    def regions(self, maps: Tensor) -> Tensor:
        """The scores that are ranked, ``[B, h, w]``."""
        return maps if self.ranking == "map" else F.adaptive_avg_pool2d(maps.unsqueeze(1), self.cells).squeeze(1)

    def relaxed_shares(self, maps: Tensor, progress: float, generator: Generator | None) -> Tensor:
        """Shares of regions at the inner steps ``[B, S, h, w]``, of maps ``[B, h, w]``."""
        regions = self.regions(maps)
        scores, size = regions.flatten(1), regions.shape[-2:]
        portions = strata(scores.shape[1], self.steps)
        places = portions if self.ranking == "map" else torch.ones(scores.shape[1], dtype=torch.long)
        if generator is not None:
            scores = with_gumbel_noise(scores, self.noise * (1 - progress), generator)
        order = relaxed_order(scores, places, self.temperature_at(progress), iterations=self.iterations)
        if self.straight_through:
            order = straight_through(order, scores, places)
        taken = shares(order)
        if self.ranking == "cells":
            taken = taken[:, portions.cumsum(0)[:-1].to(taken.device) - 1]
        return taken.unflatten(2, size)


@dataclass(frozen=True)
class LearningOptions(AreaOptions):
    """As for the areas; ``target``: the class explained, the model's own ``top1`` or the picture's ``label``.

    ``passes``: the most pictures in one pass of the explained model with its gradient, which bounds memory.
    """

    target: Target = "top1"
    passes: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in get_args(Target):
            raise UsageError(f"aha.target: expected top1 or label, got {self.target!r}")
        if self.passes < 1:
            raise UsageError(f"aha.passes: expected at least 1, got {self.passes}")


@dataclass(frozen=True)
class ExplainerOptions(LearningOptions):
    """As for the learning; the decoder's own are those of :class:`DecoderConfig`."""

    layers: tuple[str, ...] = ()
    grid: int | None = None
    width: int = DecoderConfig.width
    blocks: int = DecoderConfig.blocks
    guide: int = DecoderConfig.guide
    stride: int = DecoderConfig.stride

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.decoder

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder's config."""
        return DecoderConfig(**{one.name: getattr(self, one.name) for one in dataclasses.fields(DecoderConfig)})


class AhaObjective:
    """An explainer's decoder learns maps whose order makes the model's probability fall and rise fastest.

    (AHA, abstract and methodology: deletion and insertion themselves, through a Gumbel-Sinkhorn order.) The
    explained model is frozen: gradients pass through it to the pictures, and none reaches its parameters.

    Raises:
        UsageError: more cells than the explainer's map has places.
    """

    def __init__(self, explainer: LearnedExplainer, options: LearningOptions | None = None) -> None:
        self.explainer = explainer
        self.options = LearningOptions() if options is None else options
        side = min(map_size(explainer.config, explainer.model))
        if self.options.ranking == "cells" and self.options.cells > side:
            raise UsageError(
                f"aha.cells: expected at most {side} a side, the places of the map at stride "
                f"{explainer.config.stride}, got {self.options.cells}; set fewer cells, or a smaller stride"
            )

    @property
    def trained(self) -> nn.Module:
        """The decoder."""
        return self.explainer.decoder

    def loss(
        self, pictures: Tensor, labels: Tensor, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The areas' signed sum, averaged over pictures ``[B, 3, H, W]`` in [0, 1], and the areas themselves."""
        images, targets, features, logits = self._read(pictures, labels)
        options, terms = self.options, self.options.terms
        maps = self.explainer.maps(features, images, targets.view(-1, 1)).squeeze(1)
        with full_precision(images.device):
            taken = options.relaxed_shares(maps.to(images.dtype), progress, generator)
        scene = make_scene(self.explainer.model, images, targets, terms, options.passes, logits)
        found = areas(scene, taken, terms, options.passes)
        means = found.detach().mean(dim=0)
        return signed(found, terms).mean(), {"deletion": means[0], "insertion": means[1]}

    @torch.no_grad()
    def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Areas of the map's hard order, ``[B]``; ``score`` is insertion minus deletion."""
        images, targets, features, logits = self._read(pictures, labels)
        options, terms = self.options, self.options.terms[:2]
        maps = self.explainer.maps(features, images, targets.view(-1, 1)).squeeze(1).to(images.dtype)
        taken = hard_shares(maps.flatten(1), options.steps).unflatten(2, maps.shape[-2:])
        scene = make_scene(self.explainer.model, images, targets, terms, options.passes, logits)
        deletion, insertion = areas(scene, taken, terms, options.passes).unbind(dim=1)
        return {"score": insertion - deletion, "deletion": deletion, "insertion": insertion}

    def _read(self, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Images, targets ``[B]``, features and logits."""
        images = self.explainer.model.normalise(pictures).to(self.explainer.model.dtype)
        features, logits = self.explainer.read(images)
        return images, logits.argmax(dim=1) if self.options.target == "top1" else labels, features, logits


def signed(found: Tensor, terms: tuple[Term, ...]) -> Tensor:
    """The loss of each image ``[B]``: its areas ``[B, len(terms)]`` with their signs."""
    return found @ found.new_tensor([term.sign for term in terms])
