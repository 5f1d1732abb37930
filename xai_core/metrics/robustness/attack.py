"""The targeted attack on explanations (iERF eq. 7, after Dombrowski et al. 2019): another map, the same logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.attribution.differentiable import differentiable_maps, second_derivatives
from xai_core.attribution.explainer import Explainer
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier

# Adam: decay of the means of slopes and of their squares, and what keeps the quotient finite (Kingma & Ba 2015).
_MEAN, _SQUARE, _LEAST = 0.9, 0.999, 1e-8
# A pass that is differentiated twice holds about this many times what a gradient holds.
_HELD = 4


@dataclass(frozen=True)
class AttackOptions:
    """The attack's loss and its limits; defaults are those of iERF IV-B3, where it states them.

    ``explanation_weight`` and ``logit_weight`` are lambda 1 and 2; ``learning_rate`` is Adam's, in normalised
    input; ``mse`` the mean squared change of the normalised input at which an image is finished; ``bound`` the
    largest change of a channel, of 255; ``max_steps`` the most steps of an image; ``softplus_beta`` how sharply
    softplus bends where a ReLU is differentiated twice, None to leave the ReLU.
    """

    explanation_weight: float = 1e11
    logit_weight: float = 1e6
    learning_rate: float = 1e-3
    mse: float = 1e-3
    bound: float = 8.0
    max_steps: int = 300
    softplus_beta: float | None = 30.0

    def __post_init__(self) -> None:
        for name in ("explanation_weight", "learning_rate", "mse", "bound"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not self.logit_weight >= 0:
            raise UsageError(f"logit_weight: expected a number >= 0, got {self.logit_weight}")
        if self.max_steps < 1:
            raise UsageError(f"max_steps: expected at least 1, got {self.max_steps}")
        if self.softplus_beta is not None and not self.softplus_beta > 0:
            raise UsageError(f"softplus_beta: expected a number > 0 or none, got {self.softplus_beta}")


@dataclass(frozen=True)
class Attacked:
    """What became of images.

    Args:
        images: ``[B, 3, H, W]`` float64; steps: how many each took, ``[B]``.
        flat: whose map has a derivative of zero where it starts; not_finite: or one that is not finite on the way.
    """

    images: Tensor
    steps: Tensor
    flat: Tensor
    not_finite: Tensor


class Attack:
    """The attack on the maps that a method makes of a model, which must be ``differentiable``."""

    def __init__(self, model: Classifier, explainer: Explainer, options: AttackOptions) -> None:
        self._model = model
        self._explainer = dataclasses.replace(explainer, batch_size=max(1, explainer.batch_size // _HELD))
        self._options = options

    def run(self, images: Tensor, targets: Tensor, goals: Tensor) -> Attacked:
        """Moves images ``[B, 3, H, W]`` until their maps resemble the goals ``[B, H, W]``, each on its own.

        Args:
            targets: the explained classes ``[B]``; goals: maps, whose absolute values' shares are imitated.

        Raises:
            NoSecondDerivative: the network has none.
        """

        def attacked(rows: slice) -> Attacked:
            return self._attack(images[rows], targets[rows], shares(goals[rows]))

        found = run_batches(attacked, len(images), self._explainer.batch_size)
        return Attacked(*(torch.cat(parts) for parts in zip(*map(_fields, found), strict=True)))

    def _attack(self, images: Tensor, targets: Tensor, goals: Tensor) -> Attacked:
        """Adam with moments of each image's own; who is finished leaves the batch."""
        options, start = self._options, images.double()
        lowest, highest = allowed(self._model, start, options.bound)
        logits = self._model(images)
        moved, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        running = torch.arange(len(images), device=images.device)
        steps, flat, not_finite = torch.zeros_like(running), running < 0, running < 0
        for step in range(1, options.max_steps + 1):
            here = moved[running].to(images.dtype)
            to_goal = self._explanation_slope(here, targets[running], goals[running])
            slope = to_goal + self._logit_slope(here, logits[running])
            not_finite[running] = ~slope.isfinite().flatten(1).all(dim=1)
            if step == 1:
                flat = (to_goal == 0).flatten(1).all(dim=1)
            mean[running] = _MEAN * mean[running] + (1 - _MEAN) * slope
            square[running] = _SQUARE * square[running] + (1 - _SQUARE) * slope.square()
            size = (square[running] / (1 - _SQUARE**step)).sqrt() + _LEAST
            change = options.learning_rate / (1 - _MEAN**step) * mean[running] / size
            there = (moved[running] - change).clamp(lowest[running], highest[running])
            near = (there - start[running]).square().flatten(1).mean(dim=1) <= options.mse
            going = near & ~flat[running] & ~not_finite[running]
            running = running[going]
            if not len(running):
                break
            moved[running] = there[going]
            steps[running] = step
        return Attacked(moved, steps, flat, not_finite)

    def _explanation_slope(self, images: Tensor, targets: Tensor, goals: Tensor) -> Tensor:
        """The derivative of lambda 1 times the squared distance of the maps' shares to the goals'."""
        with second_derivatives(self._model, self._options.softplus_beta):
            leaves = images.detach().requires_grad_(True)
            away = shares(differentiable_maps(self._explainer, self._model, leaves, targets)) - goals
            return _slope(self._options.explanation_weight * away.square().sum(), leaves)

    def _logit_slope(self, images: Tensor, logits: Tensor) -> Tensor:
        """The derivative of lambda 2 times the squared change of the logits, which are the true network's."""
        with torch.enable_grad():
            leaves = images.detach().requires_grad_(True)
            change = self._model(leaves).double() - logits.double()
            return _slope(self._options.logit_weight * change.square().sum(), leaves)


def _fields(found: Attacked) -> tuple[Tensor, ...]:
    return found.images, found.steps, found.flat, found.not_finite


def _slope(loss: Tensor, leaves: Tensor) -> Tensor:
    """The derivative of the images' losses, float64; zero where they do not depend on the images."""
    if not loss.requires_grad:
        return torch.zeros_like(leaves, dtype=torch.float64)
    (slope,) = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return slope.double()


def shares(maps: Tensor) -> Tensor:
    """Absolute values of maps ``[B, H, W]`` over their sum, float64; a map of zeros stays."""
    size = maps.double().abs()
    total = size.sum(dim=(1, 2), keepdim=True)
    return size / torch.where(total > 0, total, 1.0)


def allowed(model: Classifier, images: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest input within ``bound`` / 255 of each channel that still is a picture.

    Both are shaped as the images. What is no value of a picture to begin with may stay where it is.
    """
    black, white = (model.normalise(value(images[:1])) for value in (torch.zeros_like, torch.ones_like))
    reach = (white - black) * bound / 255
    lowest = torch.minimum(images, torch.maximum(images - reach, black))
    return lowest, torch.maximum(images, torch.minimum(images + reach, white))


def partners(classes: Tensor, usable: Tensor) -> Tensor:
    """For each image the next one, cyclically, that is of another class and usable; -1 where there is none.

    Args:
        classes: ``[B]``; usable: whose map can be a goal, ``[B]``.
    """
    place = torch.arange(len(classes), device=classes.device)
    ahead = (place.view(1, -1) - place.view(-1, 1)) % len(classes)
    fits = (classes.view(1, -1) != classes.view(-1, 1)) & usable
    nearest = torch.where(fits, ahead, len(classes)).argmin(dim=1)
    return torch.where(fits.any(dim=1), nearest, -1)
