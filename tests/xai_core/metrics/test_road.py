"""ROAD against a slow twin, its three orders, its noise, and what it shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_curves import Counted, probability
from tests.xai_core.metrics.test_linear_imputation import slow_impute
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.errors import UsageError

SOME = {"percentages": (20, 55)}


def maps_of(count: int, size: int = 32, seed: int = 3) -> Tensor:
    return torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("noise", "seed"), [(0.0, 0), (0.05, 7)])
def test_all_orders_agree_with_a_slow_twin(noise: float, seed: int) -> None:
    model, size = tiny_cnn(), 17
    images, targets = pictures(2)
    images, maps = images[..., :size, :size], maps_of(2, size)
    wanted = [
        *chosen("road", order="most", noise=noise, seed=seed, **SOME),
        *chosen("road", order="least", noise=noise, seed=seed, **SOME),
        *chosen("road", noise=noise, seed=seed, **SOME),
    ]
    most, least, combined = evaluate(model, images, targets, maps, None, wanted, batch_size=3).values.values()
    drawn = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)).double().numpy()
    added = noise * drawn / np.array(model.data_config["std"]).reshape(3, 1, 1)
    for b in range(2):
        image, target = images[b].numpy(), int(targets[b])
        order = np.argsort(-maps[b].numpy().ravel(), kind="stable")
        changes = {"most": [], "least": []}  # type: ignore[var-annotated]
        for percentage in SOME["percentages"]:
            count = int(percentage / 100 * size * size)
            for name, gone in (("most", order[:count]), ("least", order[len(order) - count :])):
                removed = np.zeros(size * size, dtype=bool)
                removed[gone] = True
                removed = removed.reshape(size, size)
                filled = slow_impute(image, removed) + added * removed
                changes[name].append(probability(model, filled, target) - probability(model, image, target))
        assert float(most[b]) == pytest.approx(-np.mean(changes["most"]), abs=1e-6)
        assert float(least[b]) == pytest.approx(np.mean(changes["least"]), abs=1e-6)
        both = (np.mean(changes["least"]) - np.mean(changes["most"])) / 2
        assert float(combined[b]) == pytest.approx(both, abs=1e-6)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["most", "least", "combined"]))
def test_the_negative_map_is_read_from_the_other_end(seed: int, order: str) -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    map_ = maps_of(1, seed=seed)
    mirrored = {"most": "least", "least": "most", "combined": "combined"}[order]
    (here,) = evaluate(model, images, targets, map_, None, chosen("road", order=order, **SOME)).values.values()
    (there,) = evaluate(
        model, images, targets, -map_, None, chosen("road", order=mirrored, **SOME)
    ).values.values()
    torch.testing.assert_close(here, -there, rtol=1e-9, atol=1e-12)


def test_both_curves_are_followed_once_and_kept() -> None:
    counted = Counted(tiny_vit())
    images, targets = pictures(2)
    wanted = [one for order in ("most", "least", "combined") for one in chosen("road", order=order, **SOME)]
    result = evaluate(counted.model, images, targets, maps_of(2), None, wanted)
    assert counted.images == 2 + 2 * 2 * 2
    assert list(result.values) == [
        "road[order=most,percentages=20+55]",
        "road[order=least,percentages=20+55]",
        "road[percentages=20+55]",
    ]
    assert list(result.curves) == ["road_most[percentages=20+55]", "road_least[percentages=20+55]"]
    for curve in result.curves.values():
        torch.testing.assert_close(curve.fraction[0], torch.tensor([0, 204, 563], dtype=torch.float64) / 1024)
        assert not curve.prob.isnan().any()
    most, least, combined = result.values.values()
    torch.testing.assert_close(combined, (most + least) / 2)


def test_images_share_their_noise_and_seeds_differ() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    same, maps = images[:1].expand(2, -1, -1, -1), maps_of(1).expand(2, -1, -1)
    values = [
        evaluate(model, same, targets[:1].expand(2), maps, None, chosen("road", **SOME, **more)).values.popitem()[
            1
        ]
        for more in ({}, {"seed": 1}, {"noise": 0.0}, {"noise": 1.0})
    ]
    for both in values:
        torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)
    firsts = [float(both[0]) for both in values]
    assert len(set(firsts)) == 4
    # The default noise is small: it moves the value less than its absence does at a hundred times its size.
    assert abs(firsts[0] - firsts[2]) < 0.1 * abs(firsts[3] - firsts[2])


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = tiny_vit()
    images, targets = pictures(3)
    maps = maps_of(3)
    maps[1] = maps[1].abs().log()
    wanted = chosen("road", **SOME)
    (together,) = evaluate(model, images, targets, maps, None, wanted, batch_size=64).values.values()
    for b in range(3):
        one = slice(b, b + 1)
        result = evaluate(model, images[one], targets[one], maps[one], None, wanted, batch_size=1)
        (alone,) = result.values.values()
        torch.testing.assert_close(alone[0], together[b], rtol=1e-9, atol=1e-12)


def test_a_map_that_ranks_nothing_has_no_value() -> None:
    images, targets = pictures(3)
    maps = maps_of(3)
    maps[1], maps[2, 0, 0] = 0.5, float("nan")
    result = evaluate(tiny_vit(), images, targets, maps, None, chosen("road", **SOME))
    (reasons,) = result.reasons.values()
    assert reasons == (None, "the map is constant", "the map is not finite")
    for curve in result.curves.values():
        assert curve.prob.isnan().all(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "order: expected most, least, combined, got 'random'"),
        ({"percentages": [50, 20]}, r"percentages: expected rising numbers between 0 and 100, got \[50, 20\]"),
        ({"percentages": [0, 20]}, "percentages: expected rising"),
        ({"percentages": [20, 100]}, "percentages: expected rising"),
        ({"percentages": []}, "percentages: expected rising"),
        ({"noise": -0.1}, "noise: expected a standard deviation of at least 0, got -0.1"),
        ({"noise": 0.0, "seed": 3}, "seed: nothing reads it without noise"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen("road", **options)
