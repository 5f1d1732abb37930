"""How far a latent's evidence lies from where it fires."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.errors import UsageError
from xai_core.precision import full_precision

# Cells along a side at most: every pair of cells has its distance.
FINEST = 28
CORE = 0.5


@dataclass(frozen=True)
class Locality:
    """Where a latent fires against where its evidence is; each ``[N]`` float32, lengths in image diagonals.

    Both maps are read as distributions over cells (their positive parts, divided by their sums):

    - ``distance``: half the energy distance between the two (Székely and Rizzo 2013), ``E|X - Y| - E|X - X'| / 2 -
      E|Y - Y'| / 2`` for X drawn from the activation and Y from the evidence: how much farther they are from
      each other than from themselves. 0 where they are the same; between two points their distance; at most 1.
    - ``outside``: the share of the evidence outside the core of the activation (the fewest cells that hold half of
      it), over the share that evenly spread evidence would have there: 0 all inside, 1 as by chance, above 1
      avoided. NaN where the core is the whole map.
    - ``activation_spread`` and ``field_spread``: radius of gyration, the root mean square distance from the centre
      of mass; 0 for a point, at most 1/2.

    NaN throughout where either map has nothing positive.
    """

    distance: Tensor
    outside: Tensor
    activation_spread: Tensor
    field_spread: Tensor


def locality(activation: Tensor, receptive_field: Tensor) -> Locality:
    """How non-localised latents are on their images (iERF, sections V-A and V-C2, which give no measure of it).

    Both maps are averaged to the coarser of their resolutions, at most 28 x 28; cells count as square.

    Args:
        activation: token activations ``[N, h, w]``; receptive_field: their iERFs ``[N, H, W]``.

    Raises:
        UsageError: maps of another shape than that, or of different numbers.
    """
    if activation.ndim != 3 or receptive_field.ndim != 3 or len(activation) != len(receptive_field):
        raise UsageError(
            "expected an activation map [N, h, w] and a receptive field [N, H, W] of each latent, got "
            f"{tuple(activation.shape)} and {tuple(receptive_field.shape)}"
        )
    rows, columns = (
        min(FINEST, *sides) for sides in zip(activation.shape[1:], receptive_field.shape[1:], strict=True)
    )
    with torch.no_grad(), full_precision(activation.device):
        fires, evidence = (_distribution(some, rows, columns) for some in (activation, receptive_field))
        places = _places(rows, columns).to(fires)
        apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        within = (_mean_distance(fires, fires, apart) + _mean_distance(evidence, evidence, apart)) / 2
        values = Locality(
            # Rounding alone makes it negative.
            distance=(_mean_distance(fires, evidence, apart) - within).clamp(min=0),
            outside=_outside(fires, evidence),
            activation_spread=_spread(fires, places),
            field_spread=_spread(evidence, places),
        )
        undefined = (fires + evidence).isnan().any(dim=1)
        return Locality(
            **{
                one.name: torch.where(undefined, torch.nan, getattr(values, one.name)).float()
                for one in fields(Locality)
            }
        )


def _distribution(maps: Tensor, rows: int, columns: int) -> Tensor:
    """The positive part of maps over a grid's cells ``[N, rows * columns]``, of sum 1; NaN where it is none."""
    cells = F.adaptive_avg_pool2d(wide(maps).double().clamp(min=0), (rows, columns)).flatten(1)
    return cells / cells.sum(dim=1, keepdim=True)


def _places(rows: int, columns: int) -> Tensor:
    """Centres of cells, row by row ``[P, 2]``, in units of the distance between opposite corners."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    return cells / max(1.0, ((rows - 1) ** 2 + (columns - 1) ** 2) ** 0.5)


def _mean_distance(left: Tensor, right: Tensor, apart: Tensor) -> Tensor:
    return ((left @ apart) * right).sum(dim=1)


def _outside(fires: Tensor, evidence: Tensor) -> Tensor:
    ranked, order = fires.sort(dim=1, descending=True, stable=True)
    # A cell is of the core while those before it hold less than half.
    of_core = ranked.cumsum(dim=1) - ranked < CORE
    core = torch.zeros_like(of_core).scatter(1, order, of_core)
    by_chance = 1 - core.double().mean(dim=1)
    return (evidence * ~core).sum(dim=1) / torch.where(by_chance > 0, by_chance, torch.nan)


def _spread(mass: Tensor, places: Tensor) -> Tensor:
    centre = mass @ places
    return ((mass @ places.square().sum(dim=1)) - centre.square().sum(dim=1)).clamp(min=0).sqrt()
