"""Complexity metrics against slow numpy twins, at their bounds, and where they have no value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import tiny_vit
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation

NAMES = ("gini", "entropy", "effective_complexity")
MODEL = tiny_vit()


def measured(maps: Tensor, wanted: list | None = None) -> Evaluation:
    images = torch.zeros(len(maps), 3, *maps.shape[1:])
    return evaluate(MODEL, images, torch.zeros(len(maps)).long(), maps, None, wanted or chosen(*NAMES))


def slow_gini(map_: np.ndarray) -> float:
    """The mean difference of all pairs of pixels over twice the mean: another form of the Gini index."""
    values = [abs(float(value)) for value in map_.flatten()]
    pairs = sum(abs(a - b) for a in values for b in values)
    return pairs / (2 * len(values) * sum(values))


def slow_equation_33(map_: np.ndarray) -> float:
    values = sorted(abs(float(value)) for value in map_.flatten())
    d, total = len(values), sum(values)
    return 1 - 2 * sum(value / total * ((d - k + 0.5) / d) for k, value in enumerate(values, start=1))


def slow_entropy(map_: np.ndarray) -> float:
    values = [abs(float(value)) for value in map_.flatten()]
    return -sum(value / sum(values) * math.log(value / sum(values)) for value in values if value > 0)


def slow_effective_complexity(map_: np.ndarray, epsilon: float) -> float:
    values = [abs(float(value)) for value in map_.flatten()]
    return sum(value > epsilon * max(values) for value in values) / len(values)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (2, 3, 4), elements=st.floats(-1e3, 1e3, width=32)), st.floats(0, 0.9))
def test_they_agree_with_slow_twins(maps: np.ndarray, epsilon: float) -> None:
    wanted = [*chosen("gini", "entropy"), *chosen("effective_complexity", epsilon=epsilon)]
    result = measured(torch.from_numpy(maps), wanted)
    gini, entropy, effective = result.values.values()
    for b in range(2):
        if not np.any(maps[b]):
            assert gini[b].isnan() and entropy[b].isnan() and effective[b].isnan()
            continue
        assert float(gini[b]) == pytest.approx(slow_gini(maps[b]), abs=1e-9)
        assert float(gini[b]) == pytest.approx(slow_equation_33(maps[b]), abs=1e-9)
        assert float(entropy[b]) == pytest.approx(slow_entropy(maps[b]), abs=1e-9)
        assert float(effective[b]) == slow_effective_complexity(maps[b], epsilon)


def test_they_reach_their_bounds() -> None:
    maps = torch.zeros(2, 16, 16)
    maps[0] = -0.1
    maps[1, 3, 4] = 2.0
    values = measured(maps).values
    assert values["gini"].tolist() == [pytest.approx(0, abs=1e-12), pytest.approx(1 - 1 / 256)]
    assert bool((values["gini"] >= 0).all())
    assert values["entropy"].tolist() == [pytest.approx(math.log(256)), 0]
    assert values["effective_complexity"].tolist() == [1, 1 / 256]


def test_signs_do_not_matter() -> None:
    maps = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    for signed, unsigned in zip(measured(maps).values.values(), measured(maps.abs()).values.values(), strict=True):
        assert torch.equal(signed, unsigned)


def test_null_reasons() -> None:
    maps = torch.rand(4, 8, 8)
    maps[1] = 0
    maps[2, 0, 0] = float("nan")
    maps[3, 0, 0] = float("inf")
    result = measured(maps)
    for name in NAMES:
        assert result.reasons[name] == (
            None,
            "the map is zero",
            "the map is not finite",
            "the map is not finite",
        )
        assert result.values[name].isnan().tolist() == [False, True, True, True]


def test_no_forward_is_needed() -> None:
    model = tiny_vit()
    forwarded = []
    model.module.register_forward_hook(lambda *_: forwarded.append(1))
    evaluate(model, torch.zeros(1, 3, 8, 8), torch.zeros(1).long(), torch.rand(1, 8, 8), None, chosen(*NAMES))
    assert not forwarded


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, float("nan")])
def test_epsilon_is_checked(epsilon: float) -> None:
    with pytest.raises(UsageError, match="epsilon: expected a number from 0 to below 1, got"):
        chosen("effective_complexity", epsilon=epsilon)
