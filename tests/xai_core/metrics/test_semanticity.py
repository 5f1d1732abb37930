"""Semanticity against slow twins written from the paper's equations, and where it says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_vit
from xai_core.attribution.explainer import Explainer
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation, Truth
from xai_core.metrics.semanticity import ImportanceOptions, ReproducibilityOptions, patch_means
from xai_core.registry import methods, metrics

PATCH = 8
OF_MASKS = ("segmentation_difference", "macro_iou")
OF_MAPS = (*OF_MASKS, "sparsity")
MODEL = tiny_vit()


def measured(maps: Tensor, mask: Tensor, *names: str, **options: Any) -> Evaluation:
    images, targets = (values[: len(maps)] for values in pictures(4))
    wanted = chosen(*(names or OF_MAPS), **{"patch": PATCH, **options})
    return evaluate(MODEL, images, targets, maps, None, wanted, truth=Truth(mask=mask))


def value_of(found: Evaluation, name: str) -> Tensor:
    return next(values for full, values in found.values.items() if full.split("[")[0] == name)


def reasons_of(found: Evaluation, name: str) -> tuple[str | None, ...]:
    return next(told for full, told in found.reasons.items() if full.split("[")[0] == name)


def noise(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def square(count: int = 2) -> Tensor:
    """An object whose borders cut patches, with a rim of unknown pixels."""
    mask = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    mask[:, 2:27, 1:26] = 255
    mask[:, 4:25, 3:24] = 1
    return mask


# Slow twins, patch by patch.


def cells(side: int, patch: int) -> list[tuple[slice, slice]]:
    starts = range(0, side, patch)
    return [(slice(y, min(y + patch, side)), slice(x, min(x + patch, side))) for y in starts for x in starts]


def slow_importance(map_: np.ndarray, patch: int, scale: str) -> list[float]:
    means = [float(map_[cell].mean()) for cell in cells(SIZE, patch)]
    if scale == "maximum":
        return [max(mean, 0.0) / max(means) for mean in means]
    if scale == "range":
        return [(mean - min(means)) / (max(means) - min(means)) for mean in means]
    return means


def slow_shares(mask: np.ndarray, patch: int) -> list[float | None]:
    shares: list[float | None] = []
    for cell in cells(SIZE, patch):
        known = mask[cell][mask[cell] != 255]
        shares.append(float((known == 1).mean()) if len(known) else None)
    return shares


def slow_iou(important: list[bool], inside: list[bool]) -> float:
    union = sum(a or b for a, b in zip(important, inside, strict=True))
    return sum(a and b for a, b in zip(important, inside, strict=True)) / union


def slow_values(map_: np.ndarray, mask: np.ndarray, patch: int, scale: str) -> dict[str, float]:
    importance = slow_importance(map_.astype(np.float64), patch, scale)
    pairs = [(a, m) for a, m in zip(importance, slow_shares(mask, patch), strict=True) if m is not None]
    important, inside = [a >= 0.5 for a, _ in pairs], [m >= 0.5 for _, m in pairs]
    others = [not a for a in important], [not m for m in inside]
    macro = (slow_iou(important, inside) + slow_iou(*others)) / 2
    assert macro == pytest.approx(jaccard_score(inside, important, average="macro"))
    return {
        "segmentation_difference": sum(abs(m - a) for a, m in pairs) / len(pairs),
        "macro_iou": macro,
        "sparsity": sum(importance) / len(importance),
    }


@pytest.mark.parametrize("scale", ["maximum", "range", "none"])
# 1: every pixel is a patch; 12 does not divide the side, and leaves patches cut off at the border.
@pytest.mark.parametrize("patch", [1, 8, 12, 16])
def test_all_agree_with_slow_twins(patch: int, scale: str) -> None:
    maps, mask = noise(1), square()
    maps = maps.sigmoid() if scale == "none" else maps
    found = measured(maps, mask, patch=patch, scale=scale)
    for b in range(2):
        expected = slow_values(maps[b].numpy(), mask[b].numpy(), patch, scale)
        for name, value in expected.items():
            assert float(value_of(found, name)[b]) == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("method", ["rise", "smooth_grad"])
def test_reproducibility_agrees_with_a_slow_twin(method: str) -> None:
    images, targets = pictures(2)
    small = {"rise": {"masks": 8}, "smooth_grad": {"samples": 4}}[method]
    options = methods.get(method).options(**small, seed=7)
    explainer = Explainer(method, options)
    maps = explainer.maps(MODEL, images, targets)
    wanted = chosen("reproducibility", runs=3, patch=PATCH)
    found = evaluate(MODEL, images, targets, maps, None, wanted, explainer=explainer)
    for b in range(2):
        one = slice(b, b + 1)
        runs = []
        for seed in (7, 8, 9):
            again = Explainer(method, methods.get(method).options(**small, seed=seed))
            runs.append(
                slow_importance(again.maps(MODEL, images[one], targets[one])[0].double().numpy(), PATCH, "maximum")
            )
        spread = [float(np.std(scores, ddof=1)) for scores in zip(*runs, strict=True)]
        assert float(value_of(found, "reproducibility")[b]) == pytest.approx(np.mean(spread), abs=1e-5)
        assert np.mean(spread) > 0.01


def test_the_paper_by_hand() -> None:
    """Patches of 1 and 0.5, and two of negative means, which count 0; the first and half the second are object."""
    map_ = torch.zeros(1, SIZE, SIZE)
    half = SIZE // 2
    map_[0, :half, :half], map_[0, :half, half:], map_[0, half:, half:] = 4.0, 2.0, -3.0
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    mask[0, :half, : half + half // 2] = 1
    found = measured(map_, mask, patch=half)
    assert float(value_of(found, "segmentation_difference")) == 0.0
    assert float(value_of(found, "macro_iou")) == 1.0
    assert float(value_of(found, "sparsity")) == pytest.approx(1.5 / 4)


# Properties.


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 5, 8, 32]), st.floats(1e-20, 1e20))
def test_the_size_of_a_map_does_not_matter(seed: int, patch: int, size: float) -> None:
    maps, mask = noise(seed), square()
    maps[:, :16] += 2.0
    once, again = measured(maps, mask, patch=patch), measured(maps * size, mask, patch=patch)
    for name, values in once.values.items():
        assert once.reasons[name] == again.reasons[name]
        torch.testing.assert_close(again.values[name], values, rtol=0, atol=1e-5, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["maximum", "range"]))
def test_values_stay_within_their_bounds(seed: int, scale: str) -> None:
    found = measured(noise(seed), square(), scale=scale)
    for name in OF_MAPS:
        lowest, highest = metrics.get(name).bounds
        assert lowest is not None
        assert highest is not None
        assert ((value_of(found, name) >= lowest) & (value_of(found, name) <= highest)).all()


def test_the_mask_itself_is_the_best_map() -> None:
    mask = square(1)
    mask[mask == 255] = 0
    found = measured(mask.float(), mask, scale="none")
    assert float(value_of(found, "segmentation_difference")) == pytest.approx(0.0, abs=1e-12)
    assert float(value_of(found, "macro_iou")) == 1.0
    opposite = measured(1.0 - mask.float(), mask, scale="none", patch=1)
    assert float(value_of(opposite, "segmentation_difference")) == 1.0
    assert float(value_of(opposite, "macro_iou")) == 0.0


def test_unknown_pixels_say_nothing() -> None:
    maps, mask = noise(3), square()
    changed = mask.clone()
    changed[:, PATCH : 2 * PATCH, :PATCH] = 255
    other = maps.clone()
    # Within its patch the map may be moved about: the mean stays.
    other[:, PATCH : 2 * PATCH, :PATCH] = other[:, PATCH : 2 * PATCH, :PATCH].flip(1)
    for name in OF_MASKS:
        assert not torch.equal(value_of(measured(maps, mask), name), value_of(measured(maps, changed), name))
        torch.testing.assert_close(
            value_of(measured(maps, changed), name), value_of(measured(other, changed), name)
        )


def test_a_batch_equals_its_images_one_by_one() -> None:
    maps, mask = noise(4, count=4), square(4)
    together = measured(maps, mask)
    for b in range(4):
        one = slice(b, b + 1)
        alone = measured(maps[one], mask[one])
        for name, values in together.values.items():
            assert alone.values[name][0] == values[b]


def test_parts_are_measured_as_they_are_painted() -> None:
    images, targets = pictures(2)
    rows = torch.arange(SIZE) // PATCH
    parts = (4 * rows.view(-1, 1) + rows).byte().expand(2, -1, -1)
    explainer = Explainer("kernel_shap", methods.get("kernel_shap").options(samples=40))
    maps = explainer.maps(MODEL, images, targets, parts)
    wanted = chosen("reproducibility", patch=PATCH, runs=2, scale="range")
    found = evaluate(MODEL, images, targets, maps, parts, wanted, explainer=explainer)
    again = Explainer("kernel_shap", methods.get("kernel_shap").options(samples=40, seed=1))
    runs = [maps, again.maps(MODEL, images, targets, parts)]
    for b in range(2):
        one, other = (np.array(slow_importance(run[b].double().numpy(), PATCH, "range")) for run in runs)
        expected = np.mean(np.abs(one - other) / np.sqrt(2))
        assert float(value_of(found, "reproducibility")[b]) == pytest.approx(expected, abs=1e-6)
    assert float(value_of(found, "reproducibility")[0]) > 0.01


# Where there is no value.


def test_maps_that_say_nothing_give_their_reason() -> None:
    maps, mask = noise(5, count=4), square(4)
    maps[0], maps[1, 3, 3] = 0.3, torch.nan
    maps[2] = -maps[2].abs()
    columns = torch.arange(SIZE) % 2
    maps[3] = columns.float()
    for name in OF_MAPS:
        assert reasons_of(measured(maps, mask), name) == (
            "the map is constant",
            "the map is not finite",
            "no patch has a positive mean",
            "all patches are equally important",
        )
        by_range = reasons_of(measured(maps, mask, scale="range"), name)
        assert by_range[2] is None
        assert by_range[3] == "all patches are equally important"
        as_it_is = reasons_of(measured(maps, mask, scale="none"), name)
        # An importance that is the same everywhere is a statement.
        assert as_it_is == (None, "the map is not finite", "the map is not in [0, 1]", None)
        assert not measured(maps, mask).broken[f"{name}[patch=8]"].any()


def test_a_rounding_is_no_importance() -> None:
    maps = 1.0 + 6e-8 * (noise(6) > 0)
    assert len(maps.unique()) > 1
    assert reasons_of(measured(maps, square()), "sparsity") == ("all patches are equally important",) * 2


def test_masks_that_show_no_object_give_their_reason() -> None:
    maps, mask = noise(7, count=4), square(4)
    mask[0] = 0
    mask[1] = 255
    mask[2] = 0
    mask[2, 0, 0] = 1
    mask[3] = 1
    found = measured(maps, mask)
    empty = "the mask is empty"
    assert reasons_of(found, "segmentation_difference") == (empty, empty, None, None)
    assert reasons_of(found, "macro_iou") == (
        empty,
        empty,
        "no patch is mostly object",
        "no patch is mostly background",
    )
    assert reasons_of(found, "sparsity") == (None,) * 4


def test_a_method_varies_with_the_chance_of_the_one_that_it_wraps() -> None:
    images, targets = pictures(2)
    inner = {"name": "smooth_grad", "samples": 4, "seed": 3}
    explainer = Explainer("var", methods.get("var").options(of=inner, k=2))
    maps = explainer.maps(MODEL, images, targets)
    found = evaluate(MODEL, images, targets, maps, None, chosen("reproducibility", runs=2), explainer=explainer)
    assert (value_of(found, "reproducibility") > 0).all()
    again = explainer.reseeded(2)
    assert again is not None and again.options.of["seed"] == 5
    assert Explainer("var").reseeded(1) is None


def test_a_method_without_chance_cannot_vary() -> None:
    images, targets = pictures(2)
    explainer = Explainer("gradient")
    maps = explainer.maps(MODEL, images, targets)
    found = evaluate(MODEL, images, targets, maps, None, chosen("reproducibility"), explainer=explainer)
    assert found.reasons["reproducibility"] == ("the method has no seed of its own",) * 2
    assert found.values["reproducibility"].isnan().all()


def test_a_seed_whose_map_says_nothing_leaves_no_spread() -> None:
    images, targets = pictures(2)
    silent = tiny_vit()
    silent.module.head.weight.zero_()
    explainer = Explainer("smooth_grad", methods.get("smooth_grad").options(samples=2))
    found = evaluate(silent, images, targets, noise(8), None, chosen("reproducibility"), explainer=explainer)
    assert found.reasons["reproducibility"] == ("another seed's map shows no importance",) * 2
    assert not found.broken["reproducibility"].any()


# What can be asked for.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patch": 0}, "patch: expected a number of pixels"),
        ({"scale": "softmax"}, "scale: expected one of maximum, range, none, got 'softmax'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ImportanceOptions(**options)
    with pytest.raises(UsageError, match=told):
        ReproducibilityOptions(**options)


def test_one_run_has_no_spread_and_a_patch_fits_into_the_image() -> None:
    with pytest.raises(UsageError, match="runs: expected at least 2, got 1"):
        ReproducibilityOptions(runs=1)
    with pytest.raises(UsageError, match="patch: expected at most the image's side, got 33"):
        patch_means(noise(0), 33)


def test_masks_are_asked_for_before_anything_is_computed() -> None:
    images, targets = pictures(2)
    for name in OF_MASKS:
        with pytest.raises(UsageError, match="give Evidence a Truth with a mask"):
            evaluate(MODEL, images, targets, noise(0), None, chosen(name))


@pytest.mark.shared
def test_trimaps_of_pets(shared_data: Path) -> None:
    """Real masks: 1 is the animal, 2 the background, 3 the border, about which nobody knows."""
    paths = sorted((shared_data / "pets" / "trimaps").glob("*/*.png"))[:2]
    trimaps = [torch.as_tensor(np.array(Image.open(path).resize((SIZE, SIZE), 0))) for path in paths]
    mask = torch.stack([torch.where(one == 3, 255, (one == 1).byte()) for one in trimaps])
    maps = noise(2)
    found = measured(maps, mask)
    for b in range(2):
        expected = slow_values(maps[b].numpy(), mask[b].numpy(), PATCH, "maximum")
        assert float(value_of(found, "segmentation_difference")[b]) == pytest.approx(
            expected["segmentation_difference"], abs=1e-9
        )
