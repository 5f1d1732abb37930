"""Where localisation metrics have no value and why, what ties and unknown pixels do, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_localisation import ALL, SHARES, blobs, measured, noise, only
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import metrics


@pytest.fixture(scope="module")
def model() -> Classifier:
    return tiny_cnn()


def test_unknown_pixels_change_nothing(model: Classifier) -> None:
    maps, masks = noise(3), blobs(3)
    wanted = [*chosen("attribution_localisation"), *chosen("top_k_intersection", k=50)]
    wanted += [*chosen("pointing_game", tolerance=0), *chosen("region_attribution", "iou", "f1", kernel=1)]
    plain = measured(model, maps, masks, wanted)
    shouting = torch.where(masks == 255, 1e6, maps)
    for name, values in measured(model, shouting, masks, wanted).values.items():
        torch.testing.assert_close(values, plain.values[name])


def test_an_unknown_pixel_within_the_tolerance_is_a_hit(model: Classifier) -> None:
    masks, maps = torch.full((2, SIZE, SIZE), 0, dtype=torch.uint8), torch.zeros(2, SIZE, SIZE)
    masks[:, 10, 10], masks[:, 10, 11:25] = 1, 255
    maps[0, 10, 14], maps[1, 10, 16] = 2.0, 2.0
    maps[:, 30, 30] = 1.0
    values = only(measured(model, maps, masks, chosen("pointing_game", tolerance=5)))
    assert values.tolist() == [1.0, 0.0]


def test_pixels_that_tie_share(model: Classifier) -> None:
    masks, maps = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8), torch.zeros(1, SIZE, SIZE)
    masks[0, 4:8, 4:8] = 1
    maps[0, 4:8, 5:9] = 1.0
    assert only(measured(model, maps, masks, chosen("pointing_game", tolerance=0))).tolist() == [12 / 16]
    for k, expected in ((8, 12 / 16), (16, 12 / 16), (32, (12 + 16 * 4 / (SIZE**2 - 16)) / 32)):
        assert float(only(measured(model, maps, masks, chosen("top_k_intersection", k=k)))) == pytest.approx(
            expected
        )


def know_little(mask: Tensor) -> None:
    """Fifty known pixels, half of them on the object and half far from it."""
    mask.fill_(255)
    mask[2:7, 2:7], mask[24:29, 24:29] = 1, 0


EDGES = {
    "the map is not finite": (lambda maps, masks: maps[0, 5, 5].fill_(torch.nan), "all"),
    "the mask is empty": (lambda maps, masks: masks[0].masked_fill_(masks[0] == 1, 0), "all"),
    "the region covers all that is known": (lambda maps, masks: masks[0].masked_fill_(masks[0] == 0, 255), "all"),
    "the map is constant": (lambda maps, masks: maps[0].fill_(3.0), ("pointing_game", "top_k_intersection")),
    "the map has no positive relevance": (lambda maps, masks: maps[0].abs_().neg_(), SHARES),
    "no more than k pixels are known": (lambda maps, masks: know_little(masks[0]), ("top_k_intersection",)),
}


@pytest.mark.parametrize("reason", EDGES)
def test_no_value_without_a_reason(model: Classifier, reason: str) -> None:
    """One image of two is spoilt: it has no value and the right reason, the other keeps its value."""
    maps, masks = noise(2), blobs(2)
    plain = measured(model, maps.clone(), masks.clone())
    spoil, concerned = EDGES[reason]
    spoil(maps, masks)
    spoilt = measured(model, maps, masks)
    for name, values in spoilt.values.items():
        assert not spoilt.broken[name].any(), name
        assert spoilt.reasons[name][1] is None
        assert float(values[1]) == float(plain.values[name][1])
        if concerned == "all" or name.partition("[")[0] in concerned:
            assert values[0].isnan(), name
            assert spoilt.reasons[name][0] == reason
        else:
            assert values[0].isfinite(), name


def test_a_tolerance_that_reaches_everywhere_is_no_game(model: Classifier) -> None:
    wanted = [*chosen("pointing_game", tolerance=100), *chosen("pointing_game", tolerance=1e12)]
    result = measured(model, noise(2), blobs(2), wanted)
    assert all(values.isnan().all() for values in result.values.values())
    assert {told for each in result.reasons.values() for told in each} == {"the region covers all that is known"}


def test_a_mask_that_knows_nothing_is_empty(model: Classifier) -> None:
    result = measured(model, noise(1), torch.full((1, SIZE, SIZE), 255, dtype=torch.uint8))
    assert {told for (told,) in result.reasons.values()} == {"the mask is empty"}


def test_options_masks_and_needs_are_checked(model: Classifier) -> None:
    images, targets = pictures(2)
    with pytest.raises(UsageError, match="needs masks of objects"):
        evaluate(model, images, targets, noise(2), None, ALL)
    with pytest.raises(UsageError, match=r"expected masks of shape \(2, 32, 32\), got \(2, 16, 16\)"):
        measured(model, noise(2), torch.ones(2, 16, 16, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"got \[0, 2\]"):
        measured(model, noise(2), blobs(2).clamp(max=1) * 2)
    for name, options, message in (
        ("pointing_game", {"tolerance": -1}, "tolerance: expected a number of pixels >= 0, got -1"),
        ("pointing_game", {"region": "disc"}, "region: expected mask or box, got 'disc'"),
        ("top_k_intersection", {"k": 0}, "k: expected at least 1 pixel, got 0"),
        ("iou", {"kernel": 10}, "kernel: expected an odd number of pixels, got 10"),
        ("iou", {"sigma": 0}, "sigma: expected a number of pixels > 0, got 0"),
        ("iou", {"threshold": 1}, "threshold: expected a number from 0 to below 1, got 1"),
        ("iou", {"kernel": 1, "sigma": 3.0}, "sigma: nothing reads it with a kernel of one pixel"),
        ("region_attribution", {"threshold": 0.1}, "has no option 'threshold'"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen(name, **options)


@pytest.mark.parametrize(
    "entry", [one for one in metrics if one.family == "localisation"], ids=lambda one: one.name
)
def test_what_the_registry_says(entry) -> None:  # type: ignore[no-untyped-def]
    assert entry.higher_is_better
    assert entry.bounds == (0.0, 1.0)
    assert entry.needs in (("mask",), ("explainer",))
    assert all((entry.definition, entry.paper, entry.undefined, entry.unit, entry.cost, entry.summary))
