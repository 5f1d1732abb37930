"""The relaxed order against a plain Sinkhorn in log space, its limits and its gradient."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from xai_core.attribution.learned import AreaOptions
from xai_core.attribution.learned.sinkhorn import (
    hard_order,
    place_worths,
    relaxed_order,
    standardised,
    straight_through,
    with_gumbel_noise,
)


def drawn(images: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(images, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.long)


def slow_sinkhorn(scores: Tensor, sizes: Tensor, temperature: float, sweeps: int = 3_000) -> Tensor:
    """One image, in log space, from zero potentials, as it is defined."""
    count = len(scores)
    ends = [int(sizes[: place + 1].sum()) for place in range(len(sizes))]
    middles = [(end - int(size) / 2) for end, size in zip(ends, sizes, strict=True)]
    centred = torch.tensor([count / 2 - middle for middle in middles], dtype=torch.float64)
    worths = centred / ((centred**2 * sizes).sum() / count).sqrt()
    level = (scores - scores.mean()) / scores.std(correction=0)
    log_order = worths[:, None] * level[None, :] / temperature
    log_sizes = sizes.double().log()
    for _ in range(sweeps):
        log_order = log_order - log_order.logsumexp(1, keepdim=True) + log_sizes[:, None]
        log_order = log_order - log_order.logsumexp(0, keepdim=True)
    return log_order.exp()


@pytest.mark.parametrize("sizes", [ones(7), torch.tensor([2, 1, 4])], ids=["permutation", "portions"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
def test_it_is_what_sinkhorn_converges_to(sizes: Tensor, temperature: float) -> None:
    scores = drawn(3, 7)
    slow = torch.stack([slow_sinkhorn(one, sizes, temperature) for one in scores])
    torch.testing.assert_close(relaxed_order(scores, sizes, temperature), slow, rtol=0, atol=1e-8)


def test_more_iterations_leave_less_to_newton() -> None:
    """Where the order is all but hard Newton's steps do not end it, and what Sinkhorn leaves is seen."""
    scores = torch.cat([30 + drawn(1, 1), drawn(1, 99)], dim=1)
    missing = [
        float((relaxed_order(scores, ones(100), 1e-4, iterations=some).sum(2) - 1).abs().amax())
        for some in (1, 30, 1000)
    ]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 2 * missing[-1]
    shares = [
        AreaOptions(ranking="cells", cells=10, temperature=1e-4, final_temperature=1e-4, iterations=some)
        for some in (1, 1000)
    ]
    first, last = (one.relaxed_shares(scores.view(1, 10, 10), 1.0, None) for one in shares)
    assert not torch.allclose(first, last, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "tied", "outlier", "constant", "two levels"])
@pytest.mark.parametrize("count", [2, 64, 784])
@pytest.mark.parametrize("temperature", [1.0, 0.03, 1e-3])
def test_rows_and_columns_add_up(kind: str, count: int, temperature: float) -> None:
    scores = drawn(2, count, torch.float32)
    scores = {
        "normal": scores,
        "tied": scores.round(),
        "outlier": torch.cat([100 + scores[:, :1], scores[:, 1:]], dim=1),
        "constant": torch.full_like(scores, 0.7),
        "two levels": (scores > 0).float(),
    }[kind]
    for sizes in (ones(count), torch.tensor([1, count - 1])):
        order = relaxed_order(scores, sizes, temperature)
        assert bool((order >= 0).all())
        torch.testing.assert_close(order.sum(1), torch.ones_like(scores), rtol=0, atol=1e-5)
        rows = order.sum(2) / sizes
        # Spread over more than a place the sums are exact; below that the order is all but hard.
        spread = 0.3 * temperature**0.5 * count
        tolerance = 1e-5 if kind == "normal" and spread > 2 else 0.1
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=tolerance)


def test_the_best_order_is_the_sort() -> None:
    """Rearrangement: of all permutations the one that sorts earns most, so it is the limit."""
    scores, worths = drawn(1, 5)[0], place_worths(ones(5))
    earned = {order: float((worths * scores[list(order)]).sum()) for order in permutations(range(5))}
    assert max(earned, key=earned.__getitem__) == tuple(scores.argsort(descending=True).tolist())


def test_as_the_temperature_falls_it_tends_to_the_sort() -> None:
    scores = drawn(4, 30)
    for sizes in (ones(30), torch.tensor([4, 4, 7, 7, 4, 4])):
        hard = hard_order(scores, sizes)
        far = [float((relaxed_order(scores, sizes, t) - hard).abs().amax()) for t in (1.0, 0.1, 1e-2, 1e-6)]
        assert far == sorted(far, reverse=True)
        assert far[0] > 0.4
        assert far[-1] < 1e-9


def test_the_hard_order_breaks_ties_by_index() -> None:
    order = hard_order(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([1, 1, 2]))
    assert order[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]


def test_the_temperature_says_how_far_a_score_is_spread() -> None:
    """About 0.3 sqrt(temperature) of the order, whatever the number and the scale of the scores."""
    for count in (100, 600):
        order = relaxed_order(7 + 1e3 * drawn(1, count), ones(count), 0.04)[0]
        place = torch.arange(count, dtype=torch.float64) / count
        mean = place @ order
        spread = ((place**2) @ order - mean**2).sqrt().mean()
        assert float(spread) == pytest.approx(math.sqrt(0.04) / math.sqrt(12), rel=0.15)


@pytest.mark.parametrize("sizes", [ones(6), torch.tensor([1, 3, 2])], ids=["permutation", "portions"])
@pytest.mark.parametrize("temperature", [0.5, 0.15])
def test_gradients_are_those_of_differences(sizes: Tensor, temperature: float) -> None:
    scores = drawn(2, 6).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: relaxed_order(one, sizes, temperature), scores, atol=1e-6)


def test_images_do_not_know_each_other() -> None:
    scores = drawn(5, 40)
    together = relaxed_order(scores, ones(40), 0.05)
    torch.testing.assert_close(relaxed_order(scores[3:4], ones(40), 0.05), together[3:4], rtol=0, atol=1e-12)


def test_straight_through_is_hard_ahead_and_relaxed_back() -> None:
    scores = drawn(2, 9).requires_grad_(True)
    weights = drawn(9, 9)
    relaxed = relaxed_order(scores, ones(9), 0.1)
    order = straight_through(relaxed, scores, ones(9))
    torch.testing.assert_close(order, hard_order(scores.detach(), ones(9)), rtol=0, atol=1e-12)
    (through,) = torch.autograd.grad((order * weights).sum(), scores, retain_graph=True)
    (soft,) = torch.autograd.grad((relaxed * weights).sum(), scores)
    assert float(through.abs().sum()) > 0
    torch.testing.assert_close(through, soft)


def test_gumbel_noise_orders_as_plackett_and_luce() -> None:
    """With noise of scale c, a score is first with probability softmax(score / c)."""
    scores = torch.tensor([[1.0, 0.2, -0.5, -0.7]])
    many = with_gumbel_noise(scores.expand(40_000, -1), 0.8, torch.Generator().manual_seed(0))
    first = torch.bincount(many.argmax(dim=1), minlength=4) / len(many)
    torch.testing.assert_close(first, (standardised(scores)[0] / 0.8).softmax(0), rtol=0, atol=0.01)
    assert with_gumbel_noise(scores, 0.0, torch.Generator()) is scores
