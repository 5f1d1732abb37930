"""Variations of pictures: each is the plain one of its numbers, and they stay within what was asked for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_core.training.augmentation import RATIOS, augment, crop_boxes
from xai_core.training.recipe import Recipe


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, height: int = 9, width: int = 12) -> Tensor:
    return torch.randint(1, 256, (count, 3, height, width), generator=chance(5)).to(torch.uint8)


def test_nothing_asked_for_is_nothing_done() -> None:
    given = pictures(3)
    found = augment(given, Recipe(shift=0, mirror=False), chance())
    assert torch.equal(found, given.float() / 255)


def moved(picture: Tensor, down: int, right: int, mirrored: bool) -> Tensor:
    """One picture, pixel by pixel: mirrored first, then moved, black from outside."""
    _, height, width = picture.shape
    found = torch.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y - down, (width - 1 - x + right if mirrored else x - right)
            if 0 <= from_y < height and 0 <= from_x < width:
                found[:, y, x] = picture[:, from_y, from_x]
    return found


def test_every_picture_is_moved_and_mirrored_by_itself() -> None:
    given, shift = pictures(40), 2
    found = (augment(given, Recipe(shift=shift), chance()) * 255).round().to(torch.uint8)
    reach = range(-shift, shift + 1)
    seen = set()
    for one, varied in zip(given, found, strict=True):
        fits = {
            (down, right, flip)
            for down in reach
            for right in reach
            for flip in (False, True)
            if torch.equal(moved(one, down, right, flip), varied)
        }
        assert len(fits) == 1
        seen |= fits
    assert len({(down, right) for down, right, _ in seen}) > 10
    assert {flip for *_, flip in seen} == {False, True}


def test_boxes_are_as_large_and_as_wide_as_asked_for_and_lie_inside() -> None:
    centre, half = crop_boxes(4000, 0.2, chance()).unbind(1)
    assert ((centre.abs() + half) <= 1 + 1e-6).all()
    area, ratio = half.prod(dim=1), half[:, 0] / half[:, 1]
    assert area.min() >= 0.2 - 1e-6 and area.max() <= 1 + 1e-6
    assert area.mean().item() == pytest.approx(0.6, abs=0.02)
    assert ratio.min() >= RATIOS[0] - 1e-4 and ratio.max() <= RATIOS[1] + 1e-4
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.02)
    assert torch.equal(crop_boxes(3, 1.0, chance())[:, 1], torch.ones(3, 2))


def test_a_crop_is_the_box_resized() -> None:
    """A picture of a linear ramp stays one under bilinear resizing: its values tell where the box lies."""
    size, count = 16, 5
    ramp = torch.linspace(0, 240, size)
    given = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size)])
    found = augment(
        given.to(torch.uint8).expand(count, -1, -1, -1), Recipe(shift=0, mirror=False, crop=0.3), chance()
    )
    centre, half = crop_boxes(count, 0.3, chance()).unbind(1)
    steps = (torch.arange(size) + 0.5) / size * 2 - 1
    for axis, plane in ((0, found[:, 0, size // 2]), (1, found[:, 1, :, size // 2])):
        places = centre[:, axis, None] + half[:, axis, None] * steps
        expected = ((places + 1) / 2 * size - 0.5).clamp(0, size - 1) * 16 / 255
        torch.testing.assert_close(plane, expected, atol=1e-4, rtol=0)


def test_the_same_generator_draws_the_same_and_another_draws_others() -> None:
    given, recipe = pictures(8), Recipe(crop=0.4)
    first, second, other = (augment(given, recipe, chance(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == given.shape and first.min() >= 0 and first.max() <= 1
    assert math.isfinite(F.mse_loss(first, other).item())
