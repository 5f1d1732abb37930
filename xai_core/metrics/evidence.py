"""What metrics read: the explained images, and all that is derived from them, each thing once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from xai_core.attribution.explainer import Explainer
from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.metrics.shapeless import constant, not_finite, varies
from xai_core.metrics.trajectory import (
    Curve,
    Rankings,
    Trajectory,
    follow,
    rank_parts,
    rank_pixels,
)
from xai_core.metrics.truth import Truth
from xai_core.models import Classifier
from xai_core.parts.labels import mean_inside_parts
from xai_core.precision import Precision, precision_context

T = TypeVar("T")


@dataclass
class Evidence:
    """Images with their explanations, and what several metrics derive from them, computed once.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; targets: class indices ``[B]``; maps: ``[B, H, W]``.
        parts: labels ``[B, H, W]``, 255 where there is no part.
        part_scores: a part method's own scores ``[B, K]`` (NaN: no such part); a pixel map's parts score its mean
            inside them (KL-Hessian eq. 14).
        truth: what is known of the images; explainer: the method that made the maps, where it can be asked again.
        batch_size: the most images in one forward, fewer where these do not fit in memory.
        precision: arithmetic of the forwards; what is computed from their logits is computed in float64.

    Raises:
        UsageError: maps or parts of another size than the images.
    """

    model: Classifier
    images: Tensor
    targets: Tensor
    maps: Tensor
    parts: Tensor | None = None
    part_scores: Tensor | None = None
    truth: Truth = field(default_factory=Truth)
    explainer: Explainer | None = None
    batch_size: int = 32
    precision: Precision = "fp32"
    #: Every curve that was followed, by its id.
    curves: dict[str, Curve] = field(default_factory=dict)
    _kept: dict[object, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        expected = (len(self.images), *self.images.shape[-2:])
        for name, got in (("maps", self.maps), ("parts", self.parts)):
            if got is not None and tuple(got.shape) != expected:
                raise UsageError(f"metrics: expected {name} of shape {expected}, got {tuple(got.shape)}")
        device = self.images.device
        self.maps = self.maps.to(device)
        self.parts = None if self.parts is None else self.parts.to(device).long()
        self.truth = self.truth.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """The value under a key, computed when it is first asked for: what several metrics share."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]  # type: ignore[return-value]

    @property
    def method(self) -> Explainer:
        """The method that made the maps, to ask it again.

        Raises:
            UsageError: it was not given.
        """
        if self.explainer is None:
            raise UsageError(
                "metrics: expected the method that made the maps, got none: give Evidence an Explainer"
            )
        return self.explainer

    @property
    def labels(self) -> Tensor:
        """Part labels ``[B, H, W]``; one part that is the whole image where none were given."""
        return torch.zeros_like(self.maps, dtype=torch.long) if self.parts is None else self.parts

    @cached_property
    def scores(self) -> Tensor:
        """Part scores ``[B, K]`` float64; NaN where an image has no such part."""
        if self.part_scores is not None:
            return self.part_scores.to(self.images.device).double()
        return mean_inside_parts(self.maps, self.labels)

    def ranking(self, unit: str) -> Rankings:
        """The order of ``pixels`` or ``parts``, most relevant first."""
        rank = {
            "pixels": lambda: rank_pixels(self.maps.nan_to_num()),
            "parts": lambda: rank_parts(self.scores, self.labels),
        }
        return self.once(("ranking", unit), rank[unit])

    def baseline(self, baseline: Baseline) -> Tensor:
        """The images' baseline, ``[B, 3, H, W]``."""
        return self.once(baseline, lambda: make_baseline(baseline, self.model, self.images))

    def curve(self, trajectory: Trajectory) -> Curve:
        """The target's probability along a trajectory; recorded under its id, NaN where it ranks nothing."""

        def followed() -> Curve:
            curve = follow(
                self.probability,
                self.images,
                self.baseline(trajectory.baseline),
                self.ranking(trajectory.unit),
                trajectory,
                self.clean,
                self.replaced(trajectory.baseline),
            )
            self.record(trajectory.name, curve, self.unranked(trajectory.unit))
            return curve

        return self.once(trajectory, followed)

    def record(self, name: str, curve: Curve, undefined: dict[str, Tensor] | None = None) -> None:
        """Keeps a curve for the store; it is no curve where a reason speaks against it."""
        prob = curve.prob
        for where in (undefined or {}).values():
            prob = torch.where(where.view(-1, 1), torch.nan, prob)
        self.curves[name] = Curve(curve.fraction, prob)

    def unranked(self, unit: str) -> dict[str, Tensor]:
        """Why a ranking of ``pixels`` or ``parts`` would mean nothing, as reasons with where they apply."""
        reasons = not_finite(self.maps)
        if unit == "pixels":
            return {**reasons, **constant(self.maps)}
        few = (~self.scores.isnan()).sum(dim=1) < 2
        return {**reasons, "fewer than two parts": few, "all parts score the same": ~varies(self.scores)}

    @cached_property
    def clean(self) -> Tensor:
        """The target's probability on the images as they are, ``[B]`` float64."""
        return self.clean_logits.softmax(dim=1).gather(1, self.targets.view(-1, 1)).squeeze(1)

    @cached_property
    def clean_logits(self) -> Tensor:
        """All logits of the images as they are, ``[B, C]`` float64."""
        every = torch.arange(len(self), device=self.images.device)
        return self.forward(lambda rows: self.images[rows], every, lambda logits, _: logits)

    def replaced(self, baseline: Baseline) -> Tensor:
        """The target's probability on the baseline alone, ``[B]``."""
        every = torch.arange(len(self), device=self.images.device)
        return self.once(
            ("replaced", baseline), lambda: self.probability(lambda rows: self.baseline(baseline)[rows], every)
        )

    def probability(self, build: Callable[[slice], Tensor], owner: Tensor) -> Tensor:
        """The target's probability on perturbed images, as :meth:`forward`: ``[n]`` float64."""
        return self.forward(
            build,
            owner,
            lambda logits, rows: logits.softmax(dim=1).gather(1, self.targets[owner[rows]].view(-1, 1)).squeeze(1),
        )

    def logit(self, build: Callable[[slice], Tensor], owner: Tensor) -> Tensor:
        """The target's logit on perturbed images, as :meth:`forward`: ``[n]`` float64."""
        return self.forward(
            build, owner, lambda logits, rows: logits.gather(1, self.targets[owner[rows]].view(-1, 1)).squeeze(1)
        )

    def forward(
        self, build: Callable[[slice], Tensor], owner: Tensor, read: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """What is read from the logits of perturbed images; memory does not grow with their number.

        Args:
            build: the perturbed images ``[r, 3, H, W]`` of some rows; owner: ``[n]``, which image each comes from.
            read: what is kept of their logits ``[r, C]`` (float64), given those and the rows.
        """

        def forwarded(rows: slice) -> Tensor:
            batch = build(rows)
            with torch.no_grad(), precision_context(self.precision, batch.device):
                logits = self.model(batch)
            return read(logits.double(), rows)

        if not len(owner):
            return torch.zeros(0, dtype=torch.float64, device=self.images.device)
        return torch.cat(run_batches(forwarded, len(owner), self.batch_size))
