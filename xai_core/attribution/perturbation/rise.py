"""RISE: random smooth masks, each weighted by the class's probability behind it (Petsiuk et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.perturbation.masking import (
    MaskingOptions,
    behind_the_mask,
    cells_fit,
    masked_pictures,
    read_scores,
)
from xai_core.batching import run_batches
from xai_core.models import Classifier
from xai_core.registry import methods


@dataclass(frozen=True)
class RiseOptions(MaskingOptions):
    """Options of RISE; the defaults are the paper's (section 4, masks of VGG16; it takes 8000 for ResNet-50).

    ``masks``: N; ``grid``: cells a side of the small masks; ``keep``: p, with which a cell is kept; ``seed`` of
    the draw, which is the same for all images.
    """

    method: ClassVar[str] = "rise"

    masks: int = 4000
    grid: int = 7
    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_least(1, "masks", "grid")
        self.expect_at_least(0, "seed")
        self.expect(0 < self.keep < 1, "keep", "a probability between 0 and 1")


@methods.register(
    "rise",
    options=RiseOptions,
    paper="Petsiuk et al. 2018, RISE: Randomized Input Sampling for Explanation of Black-box Models",
    equation="6",
    needs=(cells_fit,),
    cost="masks forwards (4000)",
    gradient_free=True,
)
def rise(model: Classifier, images: Tensor, classes: Tensor, options: RiseOptions, batch_size: int) -> Tensor:
    """RISE: sum over random masks of probability times mask, divided by N p."""
    size = (images.shape[-2], images.shape[-1])
    draw = SmallMasks.draw(options, size, images.device)
    behind = behind_the_mask(model, images, options)
    maps = torch.zeros(classes.numel(), size[0] * size[1], dtype=torch.float64, device=images.device)
    for first in range(0, options.masks, batch_size):
        masks = draw.enlarge(slice(first, first + batch_size))

        def weights(pairs: slice, masks: Tensor = masks) -> Tensor:
            pictures, image = masked_pictures(
                pairs, images, behind, lambda number: masks[number].to(images.dtype).unsqueeze(1)
            )
            return read_scores(model, pictures, classes[image], "probability")

        scores = torch.cat(run_batches(weights, len(masks) * len(images), batch_size))
        maps.addmm_(scores.view(len(masks), -1).T, masks.flatten(1))
    return maps.div_(options.masks * options.keep).view(*classes.shape, *size)


@dataclass(frozen=True)
class SmallMasks:
    """Drawn masks before enlargement: ``cells`` ``[N, s, s]``, and how far each enlarged one is moved, ``[N]``.

    ``vertical`` ``[(s + 1) c, s]`` and ``horizontal`` are bilinear enlargement along an axis, c pixels a cell and
    one cell more than the input needs, so that any shift below c leaves it covered.
    """

    cells: Tensor
    down: Tensor
    right: Tensor
    vertical: Tensor
    horizontal: Tensor
    size: tuple[int, int]

    @classmethod
    def draw(cls, options: RiseOptions, size: tuple[int, int], device: torch.device) -> SmallMasks:
        """All N masks from the seed alone, so that neither images nor batches change them."""
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.masks, options.grid, options.grid)
        cells = torch.rand(shape, generator=generator, dtype=torch.float64) < options.keep
        sides = [-(-length // options.grid) for length in size]
        down, right = (torch.randint(side, (options.masks,), generator=generator).to(device) for side in sides)
        vertical, horizontal = (enlargement(options.grid, side).to(device) for side in sides)
        return cls(cells.to(device), down, right, vertical, horizontal, size)

    def enlarge(self, rows: slice) -> Tensor:
        """The masks of some rows at the input's size, ``[n, H, W]`` float64 in [0, 1]."""
        height, width = (torch.arange(length, device=self.cells.device) for length in self.size)
        vertical = self.vertical[self.down[rows].unsqueeze(1) + height]
        horizontal = self.horizontal[self.right[rows].unsqueeze(1) + width]
        return vertical @ self.cells[rows].double() @ horizontal.transpose(1, 2)


def enlargement(cells: int, side: int) -> Tensor:
    """Linear enlargement of a line of ``cells`` to ``(cells + 1) side`` pixels, as a matrix in float64."""
    units = torch.eye(cells, dtype=torch.float64).unsqueeze(0)
    return F.interpolate(units, size=(cells + 1) * side, mode="linear", align_corners=False)[0].T.contiguous()
