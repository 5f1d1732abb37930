"""Gradients with respect to the input: plain, times the input, and averaged over noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xai_core.attribution.gradients.second_order import graph_start, recomputed
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.registry import methods

Channels = Literal["max_abs", "sum_abs", "sum"]

# How the values of a pixel's colour channels become one, [B, 3, H, W] to [B, H, W].
CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_abs": lambda values: values.abs().amax(dim=1),
    "sum_abs": lambda values: values.abs().sum(dim=1),
    "sum": lambda values: values.sum(dim=1),
}


def check_channels(method: str, channels: str) -> None:
    """Refuses an unknown rule for the colour channels: a UsageError that names the method's option."""
    if channels not in CHANNELS:
        raise UsageError(f"{method}.channels: expected {', '.join(CHANNELS)}, got {channels!r}")


def input_gradient(model: Classifier, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of each image's target logit with respect to its pixels, in one pass.

    Returns:
        Logits ``[B, C]`` (detached) and gradients shaped as the images.
    """
    with torch.enable_grad():
        leaves = images.detach().requires_grad_(True)
        logits = model(leaves)
        (gradients,) = torch.autograd.grad(logits.gather(1, targets.view(-1, 1)).sum(), leaves)
    return logits.detach(), gradients


def input_gradients(
    model: Classifier, images: Tensor, classes: Tensor, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``reduce`` makes of the input gradient of each class's logit; the classes share one forward.

    Images that require gradients are differentiated through: the result has a graph that leads back to them.

    Args:
        images: ``[B, 3, H, W]``; classes: ``[B, K]``; reduce: ``[B, 3, H, W]`` to ``[B, ...]``.

    Returns:
        ``[B, K, ...]``.
    """
    with torch.enable_grad():
        leaves = graph_start(images)
        logits = model(leaves)
    twice = images.requires_grad
    return per_class(logits, classes, [leaves], lambda gradients: reduce(gradients[0]), create_graph=twice)


@dataclass(frozen=True)
class GradientOptions:
    """``channels``: a pixel is its channels' largest magnitude (the paper), the magnitudes' sum, or the sum."""

    channels: Channels = "max_abs"

    def __post_init__(self) -> None:
        check_channels("gradient", self.channels)


@methods.register(
    "gradient",
    options=GradientOptions,
    paper="Simonyan et al. 2014, Deep Inside Convolutional Networks",
    equation="section 3.1",
    cost="1 forward + 1 input gradient a class",
    half_precision=False,
    differentiable=True,
)
def gradient(
    model: Classifier, images: Tensor, classes: Tensor, options: GradientOptions, batch_size: int
) -> Tensor:
    """Gradient saliency: the largest magnitude over the channels of the logit's gradient at the pixel."""
    return input_gradients(model, images, classes, CHANNELS[options.channels])


@methods.register(
    "input_x_gradient",
    paper="Shrikumar et al. 2016, Not Just a Black Box",
    equation="section 2",
    cost="1 forward + 1 input gradient a class",
    half_precision=False,
    differentiable=True,
)
def input_x_gradient(
    model: Classifier, images: Tensor, classes: Tensor, options: object, batch_size: int
) -> Tensor:
    """Input times gradient in the normalised input space, summed over the channels with its sign."""
    return input_gradients(model, images, classes, lambda gradients: (images * gradients).sum(dim=1))


@dataclass(frozen=True)
class SmoothGradOptions:
    """Options of SmoothGrad; defaults are those of the authors' library.

    ``samples``: noisy copies of an image; ``noise``: standard deviation as a fraction of the image's range
    (largest minus smallest normalised value); ``square``: average squared gradients instead; ``channels``: how a
    pixel's channels become one value, after the average; ``seed``: of the noise.
    """

    samples: int = 25
    noise: float = 0.15
    square: bool = False
    channels: Channels = "sum_abs"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"smooth_grad.samples: expected at least 1, got {self.samples}")
        if not self.noise >= 0:
            raise UsageError(f"smooth_grad.noise: expected a number >= 0, got {self.noise}")
        if self.seed < 0:
            raise UsageError(f"smooth_grad.seed: expected a whole number >= 0, got {self.seed}")
        check_channels("smooth_grad", self.channels)


@methods.register(
    "smooth_grad",
    options=SmoothGradOptions,
    paper="Smilkov et al. 2017, SmoothGrad; the squared variant: Hooker et al. 2019",
    equation="section 2",
    cost="samples x (forward + 1 input gradient a class)",
    differentiable=True,
)
def smooth_grad(
    model: Classifier, images: Tensor, classes: Tensor, options: SmoothGradOptions, batch_size: int
) -> Tensor:
    """SmoothGrad: the mean of the gradients of noisy copies of the image."""
    count = len(images)
    spread = options.noise * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3))).view(-1, 1, 1, 1)
    mean = images.new_zeros(*classes.shape, *images.shape[1:])

    def add_pairs(rows: slice) -> None:
        pairs = torch.arange(rows.start, rows.stop, device=images.device)
        owner = pairs % count
        noise = sample_noise(options.seed, rows, count, images)
        gradients = recomputed(
            lambda copies: input_gradients(model, copies, classes[owner], lambda one: one),
            images[owner] + spread[owner] * noise,
        )
        mean.index_add_(0, owner, (gradients.square() if options.square else gradients) / options.samples)

    # Sample by sample, so that the images of a pass share one draw; the sum is the last thing a pass does, so that
    # one that is halved for want of memory has added nothing.
    run_batches(add_pairs, count * options.samples, batch_size)
    return CHANNELS[options.channels](mean.flatten(0, 1)).unflatten(0, classes.shape)


def sample_noise(seed: int, rows: slice, count: int, like: Tensor) -> Tensor:
    """Standard normal pictures of the (sample, image) pairs in ``rows``; a sample's is the same for every image.

    Args:
        rows: a stretch of the flat list in which pair ``sample * count + image`` stands; like: ``[B, 3, H, W]``.
    """
    samples = range(rows.start // count, (rows.stop - 1) // count + 1)
    pictures = [_normal_picture(seed, sample, like.shape[1:]) for sample in samples]
    which = torch.arange(rows.start, rows.stop) // count - samples.start
    return torch.stack(pictures).to(like)[which.to(like.device)]


def _normal_picture(seed: int, sample: int, shape: torch.Size) -> Tensor:
    own_seed = np.random.SeedSequence((seed, sample)).generate_state(1)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(own_seed)))
