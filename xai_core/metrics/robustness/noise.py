"""Noisy copies of images, explained again: what the metrics of robustness share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_core.attribution.gradients.gradient import sample_noise
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.shapeless import not_finite, zero

#: What is kept of noisy copies ``[r, 3, H, W]``, given those and the images that they are of, ``[r]``.
Read = Callable[[Tensor, Tensor], Tensor]

# Names the stream of draws, so that a method with random parts and the same seed draws others.
_STREAM = 1806


@dataclass(frozen=True)
class NoiseOptions:
    """``samples``: noisy copies of every image; ``seed``: of their noise, which is the same for every image."""

    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"samples: expected at least 1, got {self.samples}")
        if self.seed < 0:
            raise UsageError(f"seed: expected a whole number >= 0, got {self.seed}")


def noise_pictures(seed: int, samples: slice, like: Tensor) -> Tensor:
    """Standard normal pictures of some draws, ``[s, 3, H, W]``; more draws leave the earlier ones as they are.

    Args:
        samples: which draws; like: images ``[B, 3, H, W]``, whose size, type and device the pictures have.
    """
    own_seed = np.random.SeedSequence((seed, _STREAM)).generate_state(1)[0]
    return sample_noise(int(own_seed), samples, 1, like)


@dataclass(frozen=True)
class Neighbours:
    """What was read of noisy copies: ``values`` ``[B, samples, m]`` float64.

    ``kept`` ``[B, samples]`` says on which copies the model's top 1 is the clean image's. The others explain
    another decision; their values are NaN.
    """

    kept: Tensor
    values: Tensor

    @property
    def undefined(self) -> dict[str, Tensor]:
        """Why nothing can be said of an image, as reasons with where they apply."""
        not_finite = ~self.values.isfinite().all(dim=2) & self.kept
        return {
            "the prediction flips on every noisy copy": ~self.kept.any(dim=1),
            "the map of a noisy copy is not finite": not_finite.any(dim=1),
        }

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values ``[B, samples]`` over the copies that are kept, ``[B]``."""
        return torch.where(self.kept, values, 0.0).sum(dim=1) / self.kept.sum(dim=1)

    def highest(self, values: Tensor) -> Tensor:
        """The highest of values ``[B, samples]`` among the copies that are kept, ``[B]``."""
        return torch.where(self.kept, values, -torch.inf).amax(dim=1)


def explain_neighbours(
    evidence: Evidence, options: NoiseOptions, move: Callable[[Tensor, Tensor], Tensor], read: Read, width: int
) -> Neighbours:
    """Reads the noisy copies of all images that keep their prediction; memory does not grow with their number.

    Args:
        move: the copies ``[r, 3, H, W]``, given images and standard normal noise of that shape.
        read: explains copies and keeps ``[r, width]`` numbers of each.
    """
    images = evidence.images
    pairs = torch.arange(len(images) * options.samples, device=images.device)
    # Sample by sample, so that the copies of a stretch share one draw.
    sample, owner = pairs // len(images), pairs % len(images)

    def copies(some: Tensor, drawn: Tensor) -> Tensor:
        first = int(drawn[0])
        noise = noise_pictures(options.seed, slice(first, int(drawn[-1]) + 1), images)
        return move(images[some], noise[drawn - first])

    top = evidence.forward(
        lambda rows: copies(owner[rows], sample[rows]), owner, lambda logits, _: logits.argmax(dim=1)
    )
    kept = top == evidence.clean_logits.argmax(dim=1)[owner]
    owner, sample = owner[kept], sample[kept]
    values = images.new_full((len(images), options.samples, width), torch.nan, dtype=torch.float64)

    def fill(rows: slice) -> None:
        values[owner[rows], sample[rows]] = read(copies(owner[rows], sample[rows]), owner[rows]).double()

    run_batches(fill, len(owner), evidence.batch_size)
    return Neighbours(kept.view(options.samples, len(images)).T, values)


def maps_again(evidence: Evidence, copies: Tensor, owner: Tensor) -> Tensor:
    """Maps ``[r, H, W]`` float64 of noisy copies, for the targets and parts of the images ``owner`` ``[r]``."""
    parts = None if evidence.parts is None else evidence.parts[owner]
    return evidence.method.maps(evidence.model, copies, evidence.targets[owner], parts).double()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between rows ``[r, ...]``, ``[r]`` float64."""
    return (a.double() - b.double()).flatten(1).norm(dim=1)


def shapeless(evidence: Evidence) -> dict[str, Tensor]:
    """Why a clean map is nothing to compare with, as reasons with where they apply."""
    return {**not_finite(evidence.maps), **zero(evidence.maps)}
