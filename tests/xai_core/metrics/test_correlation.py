"""Correlations against scipy, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xai_core.metrics.correlation import pearson, spearman

PEERS = {pearson: scipy.stats.pearsonr, spearman: scipy.stats.spearmanr}
both = pytest.mark.parametrize("correlation", PEERS, ids=lambda one: one.__name__)


@both
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(2, 30), values=st.integers(2, 9))
def test_rows_agree_with_scipy(correlation, seed: int, length: int, values: int) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values make many ties.
    a = torch.randint(0, values, (2, 3, length), generator=generator)
    b = torch.randint(0, values, (2, 3, length), generator=generator) * 0.1
    mask = torch.rand(2, 3, length, generator=generator) < 0.8
    ours, masked = correlation(a, b), correlation(a, b, mask)
    for row in np.ndindex(2, 3):
        for got, x, y in (
            (ours[row], a[row], b[row]),
            (masked[row], a[row][mask[row]], b[row][mask[row]]),
        ):
            if min(len(x.unique()), len(y.unique())) < 2:
                assert got.isnan()
            else:
                assert float(got) == pytest.approx(PEERS[correlation](x, y)[0], abs=1e-12)


@both
def test_undefined_is_nan(correlation) -> None:  # type: ignore[no-untyped-def]
    line = torch.arange(4.0)
    for length in range(1, 30):
        # The mean of some tenths is not a tenth.
        tenths = torch.full((length,), 0.1, dtype=torch.float64)
        assert correlation(tenths, torch.arange(float(length))).isnan()
    assert correlation(line, torch.tensor([1.0, math.nan, 2.0, 3.0])).isnan()
    assert correlation(line, line, torch.zeros(4, dtype=torch.bool)).isnan()
    assert correlation(line, line, torch.tensor([True, False, False, False])).isnan()
    assert correlation(torch.zeros(2, 0), torch.zeros(2, 0)).isnan().tolist() == [True, True]


@both
def test_masked_entries_may_be_anything(correlation) -> None:  # type: ignore[no-untyped-def]
    a = torch.tensor([1.0, 3.0, math.nan, 2.0, math.inf])
    b = torch.tensor([2.0, 5.0, 1.0, 9.0, math.nan])
    mask = torch.tensor([True, True, False, True, False])
    torch.testing.assert_close(correlation(a, b, mask), correlation(a[mask], b[mask]))


def test_infinity_has_a_rank_and_no_deviation() -> None:
    a, b = torch.tensor([1.0, math.inf, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    assert float(spearman(a, b)) == pytest.approx(1)
    assert pearson(a, b).isnan()
    tied, other = torch.tensor([math.inf, 1.0, math.inf, 2.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    mask = torch.tensor([True, True, True, True, False])
    expected = scipy.stats.spearmanr([9, 1, 9, 2], [1, 2, 3, 4])[0]
    assert float(spearman(tied, other, mask)) == pytest.approx(expected)


@both
def test_shapes_broadcast_and_scale_is_nothing(correlation) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(6, generator=generator, dtype=torch.float64)
    many = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    expected = torch.stack([correlation(one, row) for row in many])
    torch.testing.assert_close(correlation(one, many), expected)
    for scale in (1e-200, 1e200):
        torch.testing.assert_close(correlation(one * scale, many), expected)
        torch.testing.assert_close(correlation(many, -scale * one), -expected)
    assert float(correlation(many, many).max()) <= 1
