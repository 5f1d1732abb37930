"""The search for latents whose evidence lies elsewhere than where they fire."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xai_core.concepts.cafe.explain import explain_latents
from xai_core.concepts.cafe.locality import Locality, locality
from xai_core.concepts.cafe.reading import check_owner
from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.receptive_fields.scalars import Pooling

# Batches of explanations that are held at once, before their maps are given up for four numbers each.
_HELD = 4


@dataclass(frozen=True)
class NonLocalised:
    """Latents by how far their evidence lies from where they fire, the farthest first; ``[n]`` each.

    ``distance``: the mean over a latent's exemplars (:class:`~xai_core.concepts.cafe.Locality`); ``exemplars``:
    how many of them have one. A latent without any is not listed.
    """

    latent: Tensor
    distance: Tensor
    exemplars: Tensor


def most_non_localised(
    model: Classifier,
    images: Tensor,
    owner: Tensor,
    layer: str,
    dictionary: Dictionary,
    latents: Tensor,
    *,
    count: int = 20,
    attributor: str = "auto",
    options: Any = None,
    pooling: Pooling = "max",
    batch_size: int = 32,
) -> tuple[NonLocalised, Locality]:
    """The most non-localised latents, over exemplars of them (iERF, section V-A; the paper picks them by hand).

    Args:
        owner, latents: ``[N]`` pairs of image and latent, as the stage ``exemplars`` finds them: each latent on
            its top images. The others are as in :func:`~xai_core.concepts.cafe.explain_latents`.
        count: how many latents are listed.

    Returns:
        The latents, and the locality of every pair, in their order.
    """
    check_owner(images, owner)
    if latents.shape != owner.shape:
        raise UsageError(f"latents: expected one an owner, {tuple(owner.shape)}, got {tuple(latents.shape)}")
    order = owner.argsort(stable=True)
    found = []
    for some in order.split(_HELD * batch_size):
        explained = explain_latents(
            model,
            images,
            owner[some],
            layer,
            dictionary,
            latents[some],
            attributor=attributor,
            options=options,
            pooling=pooling,
            batch_size=batch_size,
        )
        found.append(locality(explained.activation, explained.receptive_field))
    back = order.argsort().to(images.device)
    joined = {one.name: torch.cat([getattr(part, one.name) for part in found])[back] for one in fields(Locality)}
    every = Locality(**joined)
    return rank_by_distance(latents, every, count), every


def rank_by_distance(latents: Tensor, found: Locality, count: int) -> NonLocalised:
    """Latents ``[N]`` by the mean distance of their exemplars, the largest first; ties by number.

    For exemplars that were measured in several parts: join their localities first.
    """
    if count < 1:
        raise UsageError(f"count: expected at least 1, got {count}")
    distance = found.distance.double()
    defined = distance.isfinite()
    names, place = latents.to(distance.device)[defined].unique(return_inverse=True)
    exemplars = torch.bincount(place, minlength=len(names))
    total = torch.zeros(len(names), dtype=torch.float64, device=distance.device).index_add(
        0, place, distance[defined]
    )
    mean = total / exemplars
    first = mean.argsort(descending=True, stable=True)[:count]
    return NonLocalised(names[first], mean[first].float(), exemplars[first])
