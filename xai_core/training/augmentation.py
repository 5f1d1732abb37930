"""Variations of a batch of pictures, each picture's its own: moved, mirrored, cut out and drawn large."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor

from xai_core.training.recipe import Recipe

# Width over height of what is cut out, as in torchvision's RandomResizedCrop.
RATIOS = (3 / 4, 4 / 3)


def augment(pictures: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Uint8 pictures ``[B, 3, H, W]`` as float ones in [0, 1], varied as the recipe says.

    Args:
        generator: on the CPU: the same one draws the same variations on every device.
    """
    if recipe.shift or recipe.mirror:
        pictures = _moved(pictures, recipe, generator)
    varied = pictures.float() / 255
    return varied if recipe.crop == 1 else _resized_crops(varied, recipe.crop, generator)


def _moved(pictures: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Each picture moved by whole pixels of its own, black coming in at the border, and half of them mirrored."""
    count, _, height, width = pictures.shape
    device, reach = pictures.device, 2 * recipe.shift + 1
    top, left = (torch.randint(reach, (count, 1), generator=generator).to(device) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator).to(device) < (0.5 if recipe.mirror else 0.0)
    rows = torch.arange(height, device=device) + top
    columns = torch.arange(width, device=device)
    columns = torch.where(mirrored, width - 1 - columns, columns) + left
    padded = F.pad(pictures, [recipe.shift] * 4).permute(0, 2, 3, 1)
    every = torch.arange(count, device=device)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resized_crops(pictures: Tensor, smallest: float, generator: Generator) -> Tensor:
    """A box of each picture at the picture's size, bilinear; boxes as :func:`crop_boxes` draws them."""
    centre, half = crop_boxes(len(pictures), smallest, generator).to(pictures).unbind(1)
    theta = torch.cat([torch.diag_embed(half), centre.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    # The outermost samples lie half a pixel inside the box, so that the border is only ever rounding's.
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def crop_boxes(count: int, smallest: float, generator: Generator) -> Tensor:
    """Boxes inside the square from -1 to 1: ``[count, 2, 2]``, centre and half sizes, each (x, y).

    Their share of the area is even between ``smallest`` and 1, the logarithm of their ratio within ``RATIOS``,
    narrowed to what fits, and their place even over all that fit.
    """
    share, ratio, x, y = torch.rand(count, 4, generator=generator).unbind(1)
    area = smallest + share * (1 - smallest)
    # A box of this area fits if its ratio lies between the area and one over it.
    low, high = (area.log().clamp(min=math.log(RATIOS[0])), (-area.log()).clamp(max=math.log(RATIOS[1])))
    ratio = (low + ratio * (high - low)).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    centre = (2 * torch.stack([x, y], dim=1) - 1) * (1 - half)
    return torch.stack([centre, half], dim=1)
