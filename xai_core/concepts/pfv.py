"""Pointwise feature vectors (PFV): what a layer says at one position, drawn where it matters."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.layers import activations_and_gradients, as_map, layer_problem
from xai_core.models import Classifier

# Far below the logarithm of any positive float64 (-745): a position without mass is drawn after all others.
_BEHIND_ALL_MASS = -1e4
_WORD = 2**64 - 1


@dataclass(frozen=True)
class PfvSample:
    """PFVs of a batch at one layer, in the order in which they were drawn.

    ``vectors`` ``[B, n, C]`` float32; ``positions`` ``[B, n, 2]`` int64 (row, column) on a map of
    ``map_size`` (rows, columns); ``relevance`` ``[B, n]`` float32, the contribution to the target logit,
    in logits.
    """

    vectors: Tensor
    positions: Tensor
    relevance: Tensor
    map_size: tuple[int, int]


def sample_pfvs(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    layers: Sequence[str],
    *,
    per_image: int = 1,
    seeds: Tensor | Sequence[int],
) -> dict[str, PfvSample]:
    """PFVs drawn in proportion to their contribution to the target logit (iERF, relevance-weighted sampling).

    The mass of a position is the positive part of its :func:`contribution`; in an image where no position is
    positive, its absolute value. Positions are drawn without replacement, so the first n of a larger sample
    are the sample of n. Once all positions with mass are drawn, the others follow uniformly: their relevance
    is zero or negative, and zero throughout where the layer does not feed the logit.

    A draw depends on the image, its seed and the layer's name alone, not on the batch it came in. An image with
    a contribution that is not finite has the relevance NaN throughout: what it drew means nothing.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; targets: class indices ``[B]``.
        layers: module names; one pass serves them all.
        per_image: PFVs of each image, n; a map of fewer positions yields all of them.
        seeds: one integer for each image.

    Returns:
        A sample for each layer, on the device of the images.

    Raises:
        UsageError: an unknown layer or one without positions, no layers, fewer than one PFV, or seeds or
            targets that do not match the images.
    """
    _check_request(images, targets, layers, per_image, seeds)
    numbers = [int(seed) for seed in torch.as_tensor(seeds).tolist()]
    activations, gradients = activations_and_gradients(model, images, targets, layers)
    return {
        layer: _sample_map(
            as_map(model, activations[layer], layer),
            as_map(model, gradients[layer], layer),
            [_generator(seed, layer) for seed in numbers],
            per_image,
        )
        for layer in layers
    }


def contribution(activation: Tensor, gradient: Tensor) -> Tensor:
    """What each position adds to a logit to first order: activation x gradient summed over the channels.

    Args:
        activation: ``[B, C, h, w]``; gradient: of the logit, in the same shape.

    Returns:
        ``[B, h, w]`` float32, in logits.
    """
    return (activation.float() * gradient.float()).sum(dim=1)


def check_layer(model: Classifier, layer: str) -> None:
    """Refuses a layer from which no PFV can be drawn, by probing it with one random image.

    Raises:
        UsageError: an unknown layer, or one that never runs, has no spatial positions, is overwritten in
            place, or whose positions influence no logit; the message names a layer to use instead.
    """
    problem = layer_problem(model, layer)
    if problem is not None:
        raise UsageError(problem)


def _sample_map(
    activation: Tensor, gradient: Tensor, generators: Sequence[np.random.Generator], count: int
) -> PfvSample:
    rows, columns = activation.shape[-2:]
    relevance = contribution(activation, gradient).flatten(1)
    relevance = torch.where(relevance.isfinite().all(dim=1, keepdim=True), relevance, torch.nan)
    noise = np.stack([generator.gumbel(size=rows * columns) for generator in generators])
    # On the CPU in float64 on every device, so that devices differ by no more than their gradients do.
    drawn = _draw(_mass(relevance.cpu().double()), torch.from_numpy(noise), count).to(relevance.device)
    channels = activation.shape[1]
    vectors = activation.flatten(2).gather(2, drawn.unsqueeze(1).expand(-1, channels, -1)).transpose(1, 2)
    return PfvSample(
        vectors=vectors.float().contiguous(),
        positions=torch.stack([drawn // columns, drawn % columns], dim=-1),
        relevance=relevance.gather(1, drawn),
        map_size=(rows, columns),
    )


def _mass(relevance: Tensor) -> Tensor:
    """Sampling weights ``[B, P]`` from contributions; see :func:`sample_pfvs`."""
    positive = relevance.clamp(min=0)
    return torch.where(positive.any(dim=1, keepdim=True), positive, relevance.abs())


def _draw(mass: Tensor, gumbel: Tensor, count: int) -> Tensor:
    """Indices ``[B, min(count, P)]`` drawn one after another in proportion to mass (Gumbel top-k)."""
    keys = torch.where(mass > 0, mass.log(), _BEHIND_ALL_MASS) + gumbel
    return keys.topk(min(count, mass.shape[1]), dim=1).indices


def _generator(seed: int, layer: str) -> np.random.Generator:
    """A counter-based stream for an image and a layer, so that layers draw independently of each other."""
    key = np.array([seed & _WORD, zlib.crc32(layer.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _check_request(
    images: Tensor, targets: Tensor, layers: Sequence[str], per_image: int, seeds: Tensor | Sequence[int]
) -> None:
    if not layers or isinstance(layers, str):
        raise UsageError(f"layers: expected a list of at least one module name, got {layers!r}")
    if per_image < 1:
        raise UsageError(f"per_image: expected at least 1, got {per_image}")
    if images.ndim != 4 or targets.shape != images.shape[:1] or len(seeds) != len(images):
        raise UsageError(
            "expected images [B, 3, H, W] with a target and a seed each, got images "
            f"{tuple(images.shape)}, targets {tuple(targets.shape)} and {len(seeds)} seeds"
        )
