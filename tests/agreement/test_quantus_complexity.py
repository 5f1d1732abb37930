"""Agreement with Quantus: Gini, entropy and effective complexity, and what its scale of a whole batch changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import quantus
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_vit
from xai_core.metrics import Evaluation

PEERS = {
    "gini": quantus.Sparseness,
    "entropy": quantus.Complexity,
    "effective_complexity": quantus.EffectiveComplexity,
}
#: Quantus counts pixels where we give their share.
UNIT = {"effective_complexity": SIZE * SIZE}
MODEL = tiny_vit()
every_metric = pytest.mark.parametrize("name", PEERS)


def explained() -> Tensor:
    """Random maps, each with a highest magnitude of 1."""
    maps = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return maps / maps.abs().amax(dim=(1, 2), keepdim=True)


def theirs(name: str, maps: Tensor | np.ndarray, **options: Any) -> np.ndarray:
    images, targets = pictures(len(maps))
    metric = PEERS[name](**options, disable_warnings=True, display_progressbar=False)
    batch = {"x_batch": images.numpy(), "y_batch": targets.numpy(), "a_batch": np.asarray(maps)}
    return np.array(metric(model=MODEL.module, **batch, channel_first=True))


def ours(name: str, maps: Tensor, **options: Any) -> Evaluation:
    images, targets = pictures(len(maps))
    return evaluate(MODEL, images, targets, maps, None, chosen(name, **options))


def values(name: str, maps: Tensor, **options: Any) -> np.ndarray:
    (found,) = ours(name, maps, **options).values.values()
    return found.numpy() * UNIT.get(name, 1)


@every_metric
def test_equal_definitions_agree(name: str) -> None:
    # They add 1e-7 to every pixel of a Gini index, and 1e-12 inside the logarithm of an entropy.
    np.testing.assert_allclose(values(name, explained()), theirs(name, explained()), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3])
def test_effective_complexity_agrees_at_every_threshold(epsilon: float) -> None:
    maps = explained()
    maps[maps.abs() < 0.2] = 0
    counted = theirs("effective_complexity", maps, eps=epsilon)
    np.testing.assert_array_equal(values("effective_complexity", maps, epsilon=epsilon), counted)


@pytest.mark.parametrize(("name", "apart"), [("gini", 0.3), ("effective_complexity", SIZE * SIZE - 1)])
def test_their_scale_is_the_batchs_highest_value(name: str, apart: float) -> None:
    maps = explained()
    alone = values(name, maps)
    maps[1] *= 1e-7
    np.testing.assert_allclose(values(name, maps), alone, rtol=1e-9)
    beside = theirs(name, maps)
    np.testing.assert_allclose(beside[[0, 2]], alone[[0, 2]], rtol=1e-6)
    assert alone[1] - beside[1] > apart
    # By itself it has our value again.
    np.testing.assert_allclose(theirs(name, maps[1:2]), alone[1:2], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_empty_map_is_the_sparsest_and_the_least_sparse_to_them() -> None:
    maps = explained()
    maps[1] = 0
    assert theirs("gini", maps)[1] == 0
    assert theirs("effective_complexity", maps)[1] == 0
    assert np.isnan(theirs("entropy", maps)[1])
    for name in PEERS:
        result = ours(name, maps)
        assert result.reasons[name] == (None, "the map is zero", None)
        assert np.isnan(values(name, maps)).tolist() == [False, True, False]


@every_metric
def test_one_broken_map_takes_their_whole_batch_away(name: str) -> None:
    maps = explained()
    alone = values(name, maps)
    maps[1, 0, 0] = torch.nan
    beside = theirs(name, maps)
    assert not beside.any() if name == "effective_complexity" else np.isnan(beside).all()
    np.testing.assert_allclose(values(name, maps), [alone[0], np.nan, alone[2]], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_signed_maps_are_magnitudes_to_us_whatever_the_switch() -> None:
    maps = explained()
    assert np.isnan(theirs("entropy", maps, abs=False)).all()
    assert (theirs("effective_complexity", maps, abs=False) < 0.6 * SIZE * SIZE).all()
    for name in PEERS:
        np.testing.assert_array_equal(values(name, maps), values(name, maps.abs()))


@pytest.mark.parametrize("name", ["gini", "entropy"])
def test_their_unnormalised_metrics_write_into_the_callers_maps(name: str) -> None:
    maps = explained().abs().unsqueeze(1).numpy()
    before = maps.copy()
    theirs(name, maps, abs=False, normalise=False)
    assert not np.array_equal(maps, before)
    kept = explained()
    values(name, kept)
    assert torch.equal(kept, explained())
