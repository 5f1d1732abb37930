"""Linear imputation against a sparse system that is written down pixel by pixel and solved directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from xai_core.metrics.perturbation import linear_imputation
from xai_core.metrics.perturbation.linear_imputation import impute

NEIGHBOURS = {
    (dy, dx): 1 / 6 if dy == 0 or dx == 0 else 1 / 12
    for dy in (-1, 0, 1)
    for dx in (-1, 0, 1)
    if (dy, dx) != (0, 0)
}


def slow_impute(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Image ``[C, H, W]``, removed ``[H, W]``: one equation a removed pixel."""
    number = {tuple(place): index for index, place in enumerate(np.argwhere(removed))}
    system = lil_matrix((len(number), len(number)))
    right = np.zeros((len(number), len(image)))
    for (y, x), row in number.items():
        for (dy, dx), weight in NEIGHBOURS.items():
            place = (y + dy, x + dx)
            if not (0 <= place[0] < removed.shape[0] and 0 <= place[1] < removed.shape[1]):
                continue
            system[row, row] += weight
            if place in number:
                system[row, number[place]] -= weight
            else:
                right[row] += weight * image[:, place[0], place[1]]
    filled = image.copy()
    filled[:, removed] = spsolve(system.tocsc(), right).reshape(len(number), -1).T
    return filled


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def test_scattered_and_large_holes_agree_with_a_direct_solver() -> None:
    images = random_images(5, 40, 33)
    removed = torch.rand(5, 40, 33, generator=torch.Generator().manual_seed(1)) < torch.tensor(
        [0.1, 0.5, 0.95, 0.0, 0.0]
    ).view(-1, 1, 1)
    # One hole that leaves a corner pixel alone, and one along a border.
    removed[3] = True
    removed[3, 39, 0] = False
    removed[4, :, :20] = True
    filled = impute(images, removed)
    for b in range(5):
        expected = slow_impute(images[b].numpy(), removed[b].numpy())
        np.testing.assert_allclose(filled[b].numpy(), expected, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_any_size_and_mask_agree_with_a_direct_solver(height: int, width: int, seed: int, share: float) -> None:
    images = random_images(1, height, width, seed)
    removed = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed)) < share
    removed[0, seed % height, seed % width] = False
    filled = impute(images, removed)
    if removed.any():
        expected = slow_impute(images[0].numpy(), removed[0].numpy())
        np.testing.assert_allclose(filled[0].numpy(), expected, atol=1e-6)
    # A weighted mean lies within what is known.
    known = images[0][:, ~removed[0]]
    assert (filled[0].amax(dim=(1, 2)) <= known.amax(dim=1) + 1e-6).all()
    assert (filled[0].amin(dim=(1, 2)) >= known.amin(dim=1) - 1e-6).all()


def test_kept_pixels_and_untouched_images_stay_bit_by_bit() -> None:
    images = random_images(2, 9, 9).float()
    removed = torch.zeros(2, 9, 9, dtype=torch.bool)
    removed[0, 2:7, 3:5] = True
    filled = impute(images, removed)
    assert filled.dtype == torch.float32
    assert torch.equal(filled[1], images[1])
    assert torch.equal(filled[0][:, ~removed[0]], images[0][:, ~removed[0]])


def test_scale_and_offset_pass_through() -> None:
    """Pictures and normalised images are filled alike, however bright they are."""
    images = random_images(2, 16, 16)
    removed = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.7
    filled = impute(images, removed)
    for scale, offset in ((1e-6, 0.0), (255.0, 1000.0)):
        torch.testing.assert_close(
            impute(scale * images + offset, removed), scale * filled + offset, rtol=1e-6, atol=0
        )
    black = impute(torch.zeros_like(images), removed)
    assert torch.equal(black, torch.zeros_like(images))


def test_no_image_depends_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """An easy image beside hard ones: it is done early, and stays as it is."""
    images = random_images(3, 24, 24)
    removed = torch.ones(3, 24, 24, dtype=torch.bool)
    removed[:2, 0, 0] = False
    removed[2] = torch.rand(24, 24, generator=torch.Generator().manual_seed(4)) < 0.3
    together = impute(images, removed)
    alone = torch.cat([impute(images[b : b + 1], removed[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(linear_imputation, "CACHED_VALUES", 1)
    torch.testing.assert_close(impute(images, removed), alone, rtol=1e-12, atol=1e-12)


def test_a_solver_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_imputation, "MOST_ITERATIONS", 2)
    removed = torch.ones(1, 24, 24, dtype=torch.bool)
    removed[0, 0, 0] = False
    with pytest.raises(ArithmeticError, match="expected convergence in 2 iterations"):
        impute(random_images(1, 24, 24), removed)
