"""Pointwise feature vectors (PFV): what a layer says at one position, drawn where it matters."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xai_core.concepts.vectors import prefix
from xai_core.errors import UsageError
from xai_core.layers import activations_and_gradients, as_map, layer_problem
from xai_core.models import Classifier

# Far below the logarithm of any positive float64 (-745): a position without mass is drawn after all others.
_BEHIND_ALL_MASS = -1e4
_WORD = 2**64 - 1


@dataclass(frozen=True)
class PfvSample:
    """PFVs of a batch at one layer, in the order in which they were drawn; a class token comes last.

    ``vectors`` ``[B, n, C]`` float32; ``positions`` ``[B, n, 2]`` int64 (row, column) on a map of
    ``map_size`` (rows, columns), and (-1, 0) for the class token, which has no place on it; ``relevance``
    ``[B, n]`` float32, the contribution to the target logit, in logits. ``prefix``: how many prefix tokens the
    layer's output has.
    """

    vectors: Tensor
    positions: Tensor
    relevance: Tensor
    map_size: tuple[int, int]
    prefix: int

    @property
    def index(self) -> Tensor:
        """Which of the layer's vectors these are, ``[B, n]``: see :func:`vector_index`."""
        return vector_index(self.positions, self.map_size, self.prefix)


def sample_pfvs(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    layers: Sequence[str],
    *,
    per_image: int = 1,
    class_token: bool = False,
    seeds: Tensor | Sequence[int],
) -> dict[str, PfvSample]:
    """PFVs drawn in proportion to their contribution to the target logit (iERF, relevance-weighted sampling).

    The mass of a position is the positive part of its :func:`contribution`; in an image where no position is
    positive, its absolute value. Positions are drawn without replacement, so the first n of a larger sample
    are the sample of n. Once all positions with mass are drawn, the others follow uniformly: their relevance
    is zero or negative, and zero throughout where the layer does not feed the logit.

    With ``class_token`` each image gives its class token as one more vector, behind those drawn, where the model
    has one (iERF, section V-A: both patch and class tokens are PFVs). It is not drawn: it competes for no
    place, and the draw of the others is the same with and without it.

    A draw depends on the image, its seed and the layer's name alone, not on the batch it came in. An image with
    a contribution that is not finite has the relevance NaN throughout: what it drew means nothing.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; targets: class indices ``[B]``.
        layers: module names; one pass serves them all.
        per_image: PFVs drawn from each image, n; a map of fewer positions yields all of them.
        class_token: whether the class token is taken as well; models without one, and maps, have nothing to add.
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
    samples = {}
    for layer in layers:
        activation, gradient = activations[layer], gradients[layer]
        token = class_token and has_class_token(model, activation)
        samples[layer] = _sample_layer(
            as_map(model, activation, layer),
            as_map(model, gradient, layer),
            (activation[:, 0], gradient[:, 0]) if token else None,
            [_generator(seed, layer) for seed in numbers],
            per_image,
            prefix(model, activation),
        )
    return samples


def has_class_token(model: Classifier, activation: Tensor) -> bool:
    """Whether the first vector of a layer's output is a class token; registers and distillation tokens are none.

    A model that pools its patch tokens may have registers as prefix tokens and no class token.
    """
    token = getattr(model.module, "cls_token", None)
    return activation.ndim == 3 and model.num_prefix_tokens > 0 and token is not None


def vector_index(positions: Tensor, map_size: tuple[int, int], before: int) -> Tensor:
    """Which of a layer's vectors, as ``to_vectors`` lists them, stand at positions ``[..., 2]``: ``[...]``.

    Args:
        before: how many prefix tokens the layer's output has.
    """
    row, column = positions.unbind(dim=-1)
    return torch.where(row < 0, column, before + row * map_size[1] + column)


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


def _sample_layer(
    activation: Tensor,
    gradient: Tensor,
    token: tuple[Tensor, Tensor] | None,
    generators: Sequence[np.random.Generator],
    count: int,
    before: int,
) -> PfvSample:
    """A sample from a map ``[B, C, h, w]``, and the class token with its gradient, ``[B, C]`` each."""
    rows, columns = activation.shape[-2:]
    relevance = contribution(activation, gradient).flatten(1)
    of_token = relevance[:, :0] if token is None else contribution(*token).unsqueeze(1)
    finite = torch.cat([relevance, of_token], dim=1).isfinite().all(dim=1, keepdim=True)
    relevance, of_token = (torch.where(finite, values, torch.nan) for values in (relevance, of_token))
    noise = np.stack([generator.gumbel(size=rows * columns) for generator in generators])
    # On the CPU in float64 on every device, so that devices differ by no more than their gradients do.
    drawn = _draw(_mass(relevance.cpu().double()), torch.from_numpy(noise), count).to(relevance.device)
    channels = activation.shape[1]
    vectors = activation.flatten(2).gather(2, drawn.unsqueeze(1).expand(-1, channels, -1)).transpose(1, 2)
    positions = torch.stack([drawn // columns, drawn % columns], dim=-1)
    if token is not None:
        vectors = torch.cat([vectors, token[0].unsqueeze(1)], dim=1)
        positions = torch.cat([positions, positions.new_tensor([-1, 0]).expand(len(positions), 1, 2)], dim=1)
    return PfvSample(
        vectors=vectors.float().contiguous(),
        positions=positions,
        relevance=torch.cat([relevance.gather(1, drawn), of_token], dim=1),
        map_size=(rows, columns),
        prefix=before,
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
