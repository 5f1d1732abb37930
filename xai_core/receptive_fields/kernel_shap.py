"""Kernel SHAP of scalars inside a network: cells of the image are players, a scalar is what they earn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xai_core.attribution.perturbation.kernel_shap import (
    KernelShapOptions,
    fewest_samples,
    grid_labels,
    shapley_design,
)
from xai_core.attribution.perturbation.masking import MaskingOptions, behind_the_mask, blend, cells_fit
from xai_core.batching import run_batches
from xai_core.receptive_fields.attributors import attributors
from xai_core.receptive_fields.passes import Reading, output_of


@dataclass(frozen=True)
class FieldKernelShapOptions(MaskingOptions):
    """``grid``: cells a side, each a player. ``samples``: the most masked pictures of an image, ``seed`` of their
    draw, as in ``kernel_shap``. ``baseline``: the blank canvas behind cells that are not shown.
    """

    method: ClassVar[str] = "kernel_shap"

    grid: int = 7
    samples: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_least(1, "grid")
        self.expect_at_least(0, "seed")
        fewest = fewest_samples(self.grid**2)
        self.expect(self.samples >= fewest, "samples", f"at least {fewest} for {self.grid**2} cells")


@attributors.register(
    "kernel_shap",
    options=FieldKernelShapOptions,
    paper="Lundberg & Lee 2017, A Unified Approach to Interpreting Model Predictions",
    equation="theorem 2",
    needs=(cells_fit,),
    resolution="cells",
    cost="min(2^cells, samples) forwards up to the layer (2048), shared by the scalars of an image",
)
def kernel_shap(reading: Reading, options: FieldKernelShapOptions, batch_size: int) -> Iterator[Tensor]:
    """Kernel SHAP: Shapley values of the cells; they add up to z(image) - z(blank canvas)."""
    images = reading.images
    design = shapley_design(options.grid**2, KernelShapOptions(samples=options.samples, seed=options.seed))
    shown, operator = design.coalitions.to(images.device), design.operator.to(images.device)
    behind = behind_the_mask(reading.model, images, options)
    cells = grid_labels(images[:1], options.grid)[0]
    reading = reading.settled_on_images()
    earned = images.new_zeros(reading.table.shape[1], len(images) * len(shown), dtype=torch.float64)

    def play(pairs: slice) -> None:
        flat = torch.arange(pairs.start, pairs.stop, device=images.device)
        row = flat // len(shown)
        keep = shown[flat % len(shown)][:, cells].unsqueeze(1)
        some = reading.of(row)
        vectors = some.vectors(output_of(reading.model, blend(images[row], behind[row], keep), some.scalars.layer))
        for column, which in enumerate(some.all_columns()):
            mine = slice(pairs.start, pairs.start + len(which))
            earned[column, mine] = some.scalars(vectors[: len(which)], which).double()

    run_batches(play, len(images) * len(shown), batch_size)
    values = torch.einsum("ks,crs->crk", operator, earned.unflatten(1, (len(images), len(shown))))
    for found, which in zip(values, reading.all_columns(), strict=True):
        yield found[: len(which)].unflatten(1, (options.grid, options.grid))
