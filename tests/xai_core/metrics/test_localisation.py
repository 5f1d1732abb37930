"""Localisation metrics against slow twins written from the formulas, and what each does at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn
from xai_core.metrics import Evaluation, Truth
from xai_core.metrics.localisation.overlap import blurred
from xai_core.metrics.localisation.pointing_game import dilated
from xai_core.models import Classifier

BLURRED = ("region_attribution", "iou", "precision", "recall", "f1")
SHARES = ("attribution_localisation", *BLURRED)
#: All metrics of masks, with a tolerance and a k that fit pictures of 32 pixels.
ALL = [
    *chosen("pointing_game", tolerance=4.5),
    *chosen("top_k_intersection", k=50),
    *chosen(*SHARES),
]

Twin = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module")
def model() -> Classifier:
    return tiny_cnn()


def measured(model: Classifier, maps: Tensor, masks: Tensor, wanted: list | None = None) -> Evaluation:
    images, targets = pictures(len(maps))
    return evaluate(model, images, targets, maps, None, wanted or ALL, truth=Truth(mask=masks))


def only(evaluation: Evaluation) -> Tensor:
    (value,) = evaluation.values.values()
    return value


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def blobs(count: int, seed: int = 0) -> Tensor:
    """Masks of two rectangles each, with a strip that nobody knows beside the first."""
    random = np.random.default_rng(seed)
    masks = np.zeros((count, SIZE, SIZE), dtype=np.uint8)
    for mask in masks:
        for unknown in (4, 0):
            top, left = random.integers(1, SIZE - 12, 2)
            height, width = random.integers(3, 9, 2)
            mask[top : top + height, left : left + width] = 1
            mask[top : top + height, left + width : left + width + unknown] = 255
    return torch.from_numpy(masks)


def region_of(mask: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels inside and outside, by loops over nothing but the mask's own pixels."""
    inside = np.zeros(mask.shape, dtype=bool)
    ys, xs = np.nonzero(mask == 1)
    if kind == "mask":
        inside[ys, xs] = True
    else:
        inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
    return inside & (mask != 255), ~inside & (mask != 255)


def slow_hit(map_: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    ys, xs = np.nonzero(inside)
    best, hit = -math.inf, 0.0
    for y in range(SIZE):
        for x in range(SIZE):
            near = min(math.hypot(y - b, x - a) for b, a in zip(ys, xs, strict=True)) <= 4.5
            if (near or outside[y, x]) and map_[y, x] > best:
                best, hit = map_[y, x], float(near)
    return hit


def slow_top(map_: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    ranked = sorted(((map_[y, x], inside[y, x]) for y, x in np.argwhere(inside | outside)), reverse=True)
    return sum(bool(hit) for _, hit in ranked[:50]) / 50


def slow_share(map_: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    positive = np.maximum(map_.astype(np.float64), 0)
    return positive[inside].sum() / (positive[inside].sum() + positive[outside].sum())


def slow_blur(map_: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(np.maximum(map_.astype(np.float64), 0), 2.0, mode="mirror", radius=5)


def slow_marked(threshold: float, read: Callable[[int, int, int], float]) -> Twin:
    """What is read from the numbers of pixels in both, marked, and in the region."""

    def twin(map_: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
        smooth = slow_blur(map_)
        highest = max(smooth[y, x] for y, x in np.argwhere(inside | outside))
        marked = {(y, x) for y, x in np.argwhere(inside | outside) if smooth[y, x] > threshold * highest}
        region = {(y, x) for y, x in np.argwhere(inside)}
        return read(len(marked & region), len(marked), len(region))

    return twin


def harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


TWINS: list[tuple[str, dict, Twin]] = [
    ("pointing_game", {"tolerance": 4.5}, slow_hit),
    ("top_k_intersection", {"k": 50}, slow_top),
    ("attribution_localisation", {}, slow_share),
    ("region_attribution", {}, lambda map_, *region: slow_share(slow_blur(map_), *region)),
    ("iou", {"threshold": 0.3}, slow_marked(0.3, lambda both, marked, region: both / (marked + region - both))),
    ("precision", {"threshold": 0.3}, slow_marked(0.3, lambda both, marked, region: both / marked)),
    ("recall", {"threshold": 0.3}, slow_marked(0.3, lambda both, marked, region: both / region)),
    (
        "f1",
        {"threshold": 0.3},
        slow_marked(0.3, lambda both, marked, region: harmonic(both / marked, both / region)),
    ),
]


@pytest.mark.parametrize("kind", ["mask", "box"])
@pytest.mark.parametrize(("name", "options", "twin"), TWINS, ids=[name for name, _, _ in TWINS])
def test_agrees_with_its_slow_twin(model: Classifier, name: str, options: dict, twin: Twin, kind: str) -> None:
    maps, masks = noise(4), blobs(4, seed=1)
    values = only(measured(model, maps, masks, chosen(name, **options, region=kind)))
    for value, map_, mask in zip(values, maps.numpy(), masks.numpy(), strict=True):
        assert float(value) == pytest.approx(twin(map_, *region_of(mask, kind)), abs=1e-12)


def test_the_twins_tell_hits_from_misses(model: Classifier) -> None:
    hits = only(measured(model, noise(40), blobs(40), chosen("pointing_game", tolerance=2)))
    assert 0 < float(hits.mean()) < 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 60), st.integers(1, 20), st.integers(1, 20))
def test_dilation_is_by_euclidean_distance(seed: int, radius: float, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.random((3, height, width)) < 0.1
    masks[0] = False
    masks[1, random.integers(height), random.integers(width)] = True
    found = dilated(torch.from_numpy(masks), radius).numpy()
    assert not found[0].any()
    for mask, ours in zip(masks[1:], found[1:], strict=True):
        if mask.any():
            distance = ndimage.distance_transform_edt(~mask)
            np.testing.assert_array_equal(ours, distance <= radius)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 15), st.floats(0.3, 8), st.integers(7, 20))
def test_blur_agrees_with_scipy(half: int, sigma: float, size: int) -> None:
    relevance = noise(2)[:, :size].double().clamp(min=0)
    radius = min(half, size - 1)
    ours = blurred(relevance, 2 * radius + 1, sigma)
    theirs = [ndimage.gaussian_filter(one, sigma, mode="mirror", radius=radius) for one in relevance.numpy()]
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-12)
    torch.testing.assert_close(blurred(torch.ones_like(relevance), 2 * radius + 1, sigma).min().item(), 1.0)


def test_blur_reaches_its_kernel_and_no_further() -> None:
    relevance = torch.zeros(1, SIZE, SIZE, dtype=torch.float64)
    relevance[0, 16, 10] = 1e30
    rows, columns = (blurred(relevance, 11, 2.0)[0] > 0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 21, 5, 15)
    assert len(rows) == 121


def test_a_kernel_wider_than_the_picture_is_cut() -> None:
    assert blurred(torch.ones(1, 3, 40, dtype=torch.float64), 31, 5.0).sum() == pytest.approx(120)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.sampled_from([(1,), (2,), (1, 2)]))
def test_scale_and_mirrors_change_nothing(seed: int, scale: float, axes: tuple[int, ...]) -> None:
    model = tiny_cnn()
    maps, masks = noise(2, seed).double(), blobs(2, seed)
    plain = measured(model, maps, masks)
    mirrored = measured(model, (scale * maps).flip(axes), masks.flip(axes))
    for name, values in plain.values.items():
        torch.testing.assert_close(mirrored.values[name], values, rtol=1e-9, atol=1e-9)


def test_a_map_that_is_the_mask_is_right(model: Classifier) -> None:
    masks = blobs(3)
    masks[masks == 255] = 0
    exact = [*chosen("attribution_localisation"), *chosen("pointing_game", tolerance=0)]
    exact += chosen("region_attribution", "iou", "precision", "recall", "f1", kernel=1)
    for values in measured(model, masks.float(), masks, exact).values.values():
        assert values.tolist() == [1.0] * 3
    wrong = measured(model, 1.0 - masks.float(), masks, exact)
    assert all(values.tolist() == [0.0] * 3 for values in wrong.values.values())


def test_dense_maps_mark_everything_at_the_papers_threshold(model: Classifier) -> None:
    """As VAR's table has it for a region of a quarter: IoU 0.25, F1 0.4, whatever a dense positive map shows."""
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[:, : SIZE // 2, : SIZE // 2] = 1
    found = measured(model, noise(2).abs(), masks, chosen(*BLURRED)).values
    for name, expected in (("iou", 0.25), ("precision", 0.25), ("recall", 1.0), ("f1", 0.4)):
        assert found[name].tolist() == pytest.approx([expected] * 2)


def test_a_constant_positive_map_has_the_regions_area(model: Classifier) -> None:
    masks = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    masks[0, : SIZE // 4], masks[0, SIZE // 2 :] = 1, 255
    found = measured(
        model, torch.ones(1, SIZE, SIZE), masks, chosen("attribution_localisation", "region_attribution")
    )
    assert [float(values) for values in found.values.values()] == pytest.approx([0.5, 0.5])


def test_a_batch_equals_its_images_one_by_one(model: Classifier) -> None:
    maps, masks = noise(5), blobs(5)
    together = measured(model, maps, masks)
    for b in range(5):
        alone = measured(model, maps[b : b + 1], masks[b : b + 1])
        for name, values in together.values.items():
            torch.testing.assert_close(alone.values[name][0], values[b], rtol=1e-12, atol=0)


def test_the_blur_is_computed_once_for_the_five(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    from xai_core.metrics.localisation import overlap

    calls = []
    real = overlap.blurred
    monkeypatch.setattr(overlap, "blurred", lambda *given: calls.append(1) or real(*given))
    measured(model, noise(2), blobs(2), chosen(*BLURRED))
    assert len(calls) == 1
