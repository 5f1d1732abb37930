"""CAFE: latents of a sparse autoencoder explained by their receptive fields, and a test of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.baselines import Baseline
from xai_core.concepts.cafe.insertion import BLANK, InsertionCurve, insertion
from xai_core.concepts.cafe.reading import by_image, check_owner
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.pfv import has_class_token
from xai_core.concepts.vectors import prefix, to_vectors
from xai_core.errors import UsageError
from xai_core.layers import as_map
from xai_core.models import Classifier
from xai_core.precision import own_modes
from xai_core.receptive_fields import Latents, receptive_fields
from xai_core.receptive_fields import latents as latent_scalars
from xai_core.receptive_fields.scalars import Pooling

# The ranking of patches by where the latent fires, next to those by attributors.
ACTIVATION = "activation"
ATTRIBUTORS = ("auto", "integrated_gradients", "gradient", "kernel_shap")


@dataclass(frozen=True)
class LatentExplanation:
    """N latents, each on an image of its own.

    ``value`` ``[N]``: z_k of the image. ``activation`` ``[N, h, w]``: the latent at each position of the layer,
    prefix tokens left out; the naive reading of where it is. ``receptive_field`` ``[N, r, c]``: the iERF, what
    drives it. All float32 on the images' device.
    """

    value: Tensor
    activation: Tensor
    receptive_field: Tensor


def explain_latents(
    model: Classifier,
    images: Tensor,
    owner: Tensor,
    layer: str,
    dictionary: Dictionary,
    latents: Tensor,
    *,
    attributor: str = "auto",
    options: Any = None,
    pooling: Pooling = "max",
    size: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> LatentExplanation:
    """Concept-anchored feature explanations of latents (iERF, section V-B, equations 8 and 10).

    Relevance goes from the latent through the encoder and the backbone to the image.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; owner: ``[N]``, the image of each latent, in any order.
        layer: the layer that the dictionary was fitted to; latents: ``[N]``, which of its atoms.
        attributor, options, size: see :func:`xai_core.receptive_fields.receptive_fields`.
        pooling: which scalar of an image z_k is: the latent where it is largest, its sum over the positions, or
            that of the class token.
        batch_size: most images in a pass; it never changes a result.

    Raises:
        UsageError: a dictionary without an encoder of its own, or of another width than the layer; a layer
            without a class token where that is pooled; owners, latents or an attributor that do not fit.
    """
    check_owner(images, owner)
    scalars = latent_scalars(layer, owner, dictionary, latents, pooling)
    with own_modes("fp32", images.device):
        value, activation = _read(model, images, scalars, batch_size)
    fields = receptive_fields(
        model, images, scalars, attributor=attributor, options=options, batch_size=batch_size, size=size
    )
    return LatentExplanation(value, activation, fields)


def latent_insertion(
    model: Classifier,
    images: Tensor,
    owner: Tensor,
    layer: str,
    dictionary: Dictionary,
    latents: Tensor,
    *,
    attributors: Sequence[str] | Mapping[str, Any] = ATTRIBUTORS,
    pooling: Pooling = "max",
    grid: tuple[int, int] | None = None,
    steps: int | None = None,
    blank: Baseline = BLANK,
    batch_size: int = 32,
) -> dict[str, InsertionCurve]:
    """Insertion curves of latents by attributor, and of ``activation``, the naive ranking (iERF, section V-C1).

    A class token has no place: the naive ranking of its latent is where the patches fire the same latent, and is
    undefined (NaN) where none does.

    Args:
        attributors: names, or names with their options. The others are as in :func:`explain_latents` and
            :func:`~xai_core.concepts.cafe.insertion`.

    Returns:
        A curve by name, ``activation`` among them.
    """
    check_owner(images, owner)
    wanted = attributors if isinstance(attributors, Mapping) else dict.fromkeys(attributors)
    if ACTIVATION in wanted:
        raise UsageError(
            f"attributors: expected none named {ACTIVATION!r}, which is always measured; leave it out"
        )
    scalars = latent_scalars(layer, owner, dictionary, latents, pooling)
    with own_modes("fp32", images.device):
        _, activation = _read(model, images, scalars, batch_size)
    maps = {ACTIVATION: activation}
    for name, options in wanted.items():
        maps[name] = receptive_fields(
            model, images, scalars, attributor=name, options=options, batch_size=batch_size
        )
    return insertion(model, images, scalars, maps, grid=grid, steps=steps, blank=blank, batch_size=batch_size)


def _read(model: Classifier, images: Tensor, scalars: Latents, batch_size: int) -> tuple[Tensor, Tensor]:
    """Values ``[N]`` and token activations ``[N, h, w]`` of latents, in one pass an image."""

    def both(output: Tensor, which: Tensor) -> Tensor:
        if scalars.pooling == "class_token" and not has_class_token(model, output):
            raise UsageError(
                f"pooling: expected a layer with a class token for 'class_token', got {scalars.layer!r} of "
                f"{model.spec.name} without one; use 'max' or 'sum'"
            )
        vectors, before = to_vectors(model, output, scalars.layer), prefix(model, output)
        settled = scalars.settled(vectors, which, before)
        everywhere = settled.everywhere(vectors[:, before:], which)
        place = as_map(model, output, scalars.layer).shape[-2:]
        maps = everywhere.unflatten(1, place)
        return torch.cat([settled(vectors, which).view(-1, 1, 1).expand(-1, 1, place[1]), maps], dim=1)

    found = by_image(model, images, scalars.owner, scalars.layer, both, batch_size).float()
    return found[:, 0, 0].clone(), found[:, 1:]
