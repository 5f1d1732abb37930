"""Mosaics: who stands beside whom, and whatever belongs to images put together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.xai_core.tiny import SIZE, pictures, quarters
from xai_core.metrics.localisation.mosaics import Mosaics, arrange, group, join_labels, shrink, shrink_labels

HALF = SIZE // 2


def mosaics_of(count: int, side: int = 2, seed: int = 0) -> Mosaics:
    return arrange(torch.ones(count, dtype=torch.bool), pictures(count)[1], (SIZE, SIZE), side, seed)


def in_cell(cell: int) -> tuple[slice, slice]:
    row, column = divmod(cell, 2)
    return slice(row * HALF, (row + 1) * HALF), slice(column * HALF, (column + 1) * HALF)


def slow_mosaic(images: np.ndarray) -> np.ndarray:
    """Four pictures at half size, channel by channel by Pillow."""
    mosaic = np.zeros(images.shape[1:])
    for cell, image in enumerate(images):
        for channel in range(3):
            picture = Image.fromarray(image[channel].astype(np.float32))
            small = picture.resize((HALF, HALF), Image.Resampling.BILINEAR)
            mosaic[channel][in_cell(cell)] = np.asarray(small)
    return mosaic


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.sampled_from([4, 9]))
def test_as_many_groups_of_distinct_classes_as_there_can_be(classes: list[int], count: int) -> None:
    groups = group(classes, count)
    placed = [position for one in groups for position in one]
    assert len(placed) == len(set(placed))
    assert all(len({classes[position] for position in one}) == count for one in groups)
    # g groups exist exactly where the classes, each at most g times, fill them.
    sizes = Counter(classes).values()
    assert len(groups) == max(g for g in range(61) if sum(min(size, g) for size in sizes) >= g * count)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 100), st.integers(0, 100))
def test_only_eligible_images_are_placed(count: int, seed: int, draw: int) -> None:
    eligible = torch.rand(count, generator=torch.Generator().manual_seed(draw)) < 0.7
    members = arrange(eligible, torch.arange(count) % 5, (SIZE, SIZE), 2, seed).members
    assert members.shape[1:] == (4,)
    assert eligible[members.flatten()].all()


def test_every_cell_is_everyones() -> None:
    """No class has a cell of its own: over seeds, the first image stands in each of the four."""
    cells = {int((mosaics_of(8, seed=seed).members == 0).nonzero()[0, 1]) for seed in range(40)}
    assert cells == {0, 1, 2, 3}


def test_images_are_shrunk_into_their_cells() -> None:
    images, _ = pictures(8)
    mosaics = mosaics_of(8)
    pixels = mosaics.assemble(lambda rows, size: shrink(images[rows], size))
    for mosaic, members in zip(pixels.numpy(), mosaics.members, strict=True):
        np.testing.assert_allclose(mosaic, slow_mosaic(images[members].numpy()), atol=1e-5)


def test_parts_are_joined_without_gaps() -> None:
    labels, mosaics = quarters(4), mosaics_of(4)
    labels[2], labels[3] = 7, 255
    shrunk = mosaics.assemble(lambda rows, size: shrink_labels(labels[rows], size))
    joined, count = join_labels(shrunk, mosaics.cells)
    assert count.tolist() == [4 + 3 + 1 + 0]
    numbers: set[int] = set()
    for cell, image in enumerate(mosaics.members[0].tolist()):
        own = labels[image, ::2, ::2].long()
        ours = joined[0][in_cell(cell)]
        assert torch.equal(ours == 255, own == 255)
        pairs = set(zip(own[own != 255].tolist(), ours[own != 255].tolist(), strict=True))
        assert len(pairs) == len({part for part, _ in pairs}) == len({number for _, number in pairs})
        assert not numbers & {number for _, number in pairs}
        numbers |= {number for _, number in pairs}
    assert numbers == set(range(8))
