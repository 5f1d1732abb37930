"""Integrated gradients of scalars inside a network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xai_core.attribution.gradients.integrated_gradients import IntegratedGradientsOptions, path_rule
from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.receptive_fields.attributors import attributors
from xai_core.receptive_fields.one_backward import recorded_from_pixels
from xai_core.receptive_fields.passes import Reading


@attributors.register(
    "integrated_gradients",
    options=IntegratedGradientsOptions,
    paper="Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks",
    equation="1",
    cost="steps gradients up to the layer",
)
def integrated_gradients(
    reading: Reading, options: IntegratedGradientsOptions, batch_size: int
) -> Iterator[Tensor]:
    """Integrated gradients of the scalar from a baseline, summed over the colour channels with their sign."""
    images = reading.images
    start = make_baseline(Baseline(options.baseline), reading.model, images)
    path = images - start
    places, weights = (torch.from_numpy(values).to(images) for values in path_rule(options.steps))
    reading = reading.settled_on_images()
    totals = [images.new_zeros(len(which), *images.shape[-2:]) for which in reading.all_columns()]

    def add_pairs(pairs: slice) -> None:
        flat = torch.arange(pairs.start, pairs.stop, device=images.device)
        row, step = flat // options.steps, flat % options.steps
        points = torch.addcmul(start[row], places[step].view(-1, 1, 1, 1), path[row])
        weighted = path[row] * weights[step].view(-1, 1, 1, 1)
        recorded = recorded_from_pixels(reading.of(row), points)
        parts = [(found * weighted[: len(found)]).sum(dim=1) for found in recorded.gradients()]
        for total, part in zip(totals, parts, strict=False):
            total.index_add_(0, row[: len(part)], part)

    # The sum is the last thing a pass does, so that one that is halved for want of memory has added nothing.
    run_batches(add_pairs, len(images) * options.steps, batch_size)
    return iter(totals)
