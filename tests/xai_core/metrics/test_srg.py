"""Symmetric relevance gain: against deletion in both orders from scratch, also where pixels cannot be halved."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_curves import Counted, slow_area, slow_curve
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.baselines import Baseline, make_baseline
from xai_core.metrics.perturbation.curves import least_first
from xai_core.metrics.trajectory import Curve, removed_pixels


def maps_of(count: int, size: int, seed: int = 3) -> Tensor:
    return torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))


def groups(map_: np.ndarray, counts: list[int], sign: float) -> list[np.ndarray]:
    """Pixels to remove at each step, by falling ``sign`` times relevance."""
    order = np.argsort(-sign * map_.ravel(), kind="stable")
    places = np.stack(np.unravel_index(order, map_.shape), axis=1)
    return [places[a:b] for a, b in itertools.pairwise(counts)]


@pytest.mark.parametrize(("size", "steps"), [(32, 10), (32, 7), (31, 10), (31, 7), (31, 1)])
def test_agrees_with_removal_from_either_end(size: int, steps: int) -> None:
    """With 31 x 31 pixels and 10 steps no half of the pixels exists: the least relevant leave one more behind."""
    model = tiny_cnn()
    images, targets = pictures(2)
    images = images[..., :size, :size]
    maps = maps_of(2, size)
    fast = evaluate(model, images, targets, maps, None, chosen("srg", steps=steps), batch_size=7)
    most = removed_pixels(size * size, steps).tolist()
    least = [size * size - count for count in reversed(most)]
    assert (most == least) == (size == 32 or steps % 2 == 1)
    for b in range(2):
        blur = make_baseline(Baseline(), model, images[b : b + 1])[0].numpy()
        areas = {
            sign: slow_area(
                [count / size**2 for count in counts],
                slow_curve(model, images[b].numpy(), blur, groups(maps[b].numpy(), counts, sign), int(targets[b])),
            )
            for sign, counts in ((1.0, most), (-1.0, least))
        }
        assert float(next(iter(fast.values.values()))[b]) == pytest.approx(areas[-1.0] - areas[1.0], abs=1e-6)


def test_reading_insertion_backwards() -> None:
    insertion = Curve(torch.tensor([[0.0, 0.4, 1.0]]), torch.tensor([[0.1, 0.3, 0.9]]))
    least = least_first(insertion)
    torch.testing.assert_close(least.fraction, torch.tensor([[0.0, 0.6, 1.0]]))
    torch.testing.assert_close(least.prob, torch.tensor([[0.9, 0.3, 0.1]]))


def test_nothing_is_forwarded_beyond_insertion_and_deletion() -> None:
    counted = Counted(tiny_vit())
    images, targets = pictures(2)
    wanted = chosen("insertion", "deletion", "srg", steps=5)
    values = evaluate(counted.model, images, targets, maps_of(2, 32), None, wanted).values
    assert counted.images == 2 * 2 + 2 * 2 * (5 - 1)
    torch.testing.assert_close(values["srg[steps=5]"], values["insertion[steps=5]"] - values["deletion[steps=5]"])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from(["blur", "black", "noise"]))
def test_the_negative_map_gains_the_negative(steps: int, seed: int, baseline: str) -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    map_ = maps_of(1, 32, seed)
    wanted = chosen("srg", steps=steps, baseline=baseline)
    gain, loss = (evaluate(model, images, targets, sign * map_, None, wanted) for sign in (1, -1))
    (up,), (down,) = gain.values.values(), loss.values.values()
    torch.testing.assert_close(up, -down, rtol=1e-9, atol=1e-12)
    assert -1 <= float(up) <= 1


def test_random_maps_gain_nothing() -> None:
    count = 48
    images, targets = pictures(1)
    wanted = chosen("srg", steps=4)
    values = evaluate(
        tiny_vit(), images.expand(count, -1, -1, -1), targets.expand(count), maps_of(count, 32), None, wanted
    ).values["srg[steps=4]"]
    assert float(values.std()) > 0
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(count)


def test_a_map_that_ranks_nothing_has_no_gain() -> None:
    images, targets = pictures(3)
    maps = maps_of(3, 32)
    maps[1], maps[2, 0, 0] = 0.5, float("inf")
    result = evaluate(tiny_vit(), images, targets, maps, None, chosen("srg", steps=3))
    assert result.reasons["srg[steps=3]"] == (None, "the map is constant", "the map is not finite")
    assert result.values["srg[steps=3]"].isnan().tolist() == [False, True, True]
