"""Stability against a slow twin, and what the noise of all metrics of robustness is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.xai_core.metrics.explaining import Passes, corner, explained, linear, measured, root, undecided
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.attribution.gradients.gradient import sample_noise
from xai_core.errors import UsageError
from xai_core.metrics import Evidence
from xai_core.metrics.robustness.noise import noise_pictures
from xai_core.metrics.robustness.sensitivity import uniform
from xai_core.models import Classifier, ModelSpec, load_classifier

SAMPLES = 4
# So much noise that some copies flip the tiny models' predictions and others do not.
SIGMA = {tiny_vit: 0.5, tiny_cnn: 0.2}


def slow_stability(evidence: Evidence, row: int, sigma: float, seed: int = 0) -> tuple[float, int]:
    """The largest ratio, one explanation at a time, and how many copies were left out."""
    model, method = evidence.model, evidence.explainer.method  # type: ignore[union-attr]
    image, target = evidence.images[row], evidence.targets[row : row + 1]

    def shown(map_: np.ndarray) -> np.ndarray:
        return np.clip(map_ / np.abs(map_).max(), -1, 1)

    clean, ratios = shown(evidence.maps[row].double().numpy()), []
    for sample in range(SAMPLES):
        noise = noise_pictures(seed, slice(sample, sample + 1), evidence.images)[0]
        copy = image + sigma * noise
        if int(model(copy[None]).argmax()) != int(model(image[None]).argmax()):
            continue
        map_ = attribute(model, copy[None], target, method=method)[0].double().numpy()
        moved = np.sqrt(((shown(map_) - clean) ** 2).sum())
        ratios.append(moved / np.sqrt(((copy - image).numpy() ** 2).sum()))
    return max(ratios, default=float("nan")), SAMPLES - len(ratios)


@pytest.mark.parametrize("build", SIGMA, ids=lambda one: one.__name__)
def test_stability_agrees_with_a_slow_twin(build: Callable[[], Classifier]) -> None:
    images, targets = pictures(8)
    evidence = explained(undecided(build(), images), images, targets, "gradient", batch_size=5)
    values, reasons = measured(evidence, "stability", samples=SAMPLES, sigma=SIGMA[build], seed=3)
    dropped = []
    for row in range(len(images)):
        expected, flipped = slow_stability(evidence, row, SIGMA[build], seed=3)
        dropped.append(flipped)
        assert float(values[row]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert (reasons[row] is None) == (flipped < SAMPLES)
    assert any(0 < flipped < SAMPLES for flipped in dropped), dropped


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = tiny_cnn()
    images, targets = pictures(4)
    together, _ = measured(explained(model, images, targets, "gradient", batch_size=64), "stability", samples=3)
    for row in range(4):
        one = slice(row, row + 1)
        alone = explained(model, images[one], targets[one], "gradient", batch_size=1)
        torch.testing.assert_close(measured(alone, "stability", samples=3)[0][0], together[row], rtol=1e-5, atol=0)


def test_the_scale_of_maps_is_nothing() -> None:
    images, targets = pictures(2)
    evidence = explained(tiny_vit(), images, targets, "gradient")
    expected, _ = measured(evidence, "stability", samples=2)
    evidence.maps = evidence.maps * 1000
    torch.testing.assert_close(measured(evidence, "stability", samples=2)[0], expected, rtol=1e-5, atol=0)


def test_more_samples_can_only_raise_it() -> None:
    images, targets = pictures(3)
    evidence = explained(tiny_vit(), images, targets, "gradient")
    few, many = (measured(evidence, "stability", samples=samples)[0] for samples in (2, 8))
    assert bool((many >= few).all())
    assert bool((many > few).any())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), sigma=st.floats(0.001, 0.2))
def test_a_linear_model_has_perfectly_stable_gradients(seed: int, sigma: float) -> None:
    images, targets = pictures(2)
    evidence = explained(linear(), images, targets % 3, "gradient")
    values, reasons = measured(evidence, "stability", samples=3, sigma=sigma, seed=seed)
    assert [float(value) for value, told in zip(values, reasons, strict=True) if told is None] in ([0, 0], [0])


def test_why_there_is_no_value() -> None:
    images, targets = pictures(4)
    images[:, 0, 0, 0] = 40.0
    # Noise makes the value that the model sees negative, where its gradient is NaN.
    images[3, 0, 0, 0] = 0.01
    evidence = explained(corner(root), images, 0 * targets, "gradient")
    evidence.maps[1] = 0.0
    evidence.maps[2, 4, 5] = torch.nan
    values, reasons = measured(evidence, "stability", samples=8, sigma=0.1)
    assert reasons == (
        None,
        "the map is zero",
        "the map is not finite",
        "the map of a noisy copy is not finite",
    )
    assert values.isnan().tolist() == [False, True, True, True]


def test_an_image_whose_every_copy_flips_has_no_value() -> None:
    model = linear(classes=2)
    weight = model.module.weight
    images, targets = pictures(2)
    # The first image lies on the boundary but for a hair on the side that no copy is on.
    across = (weight[0] - weight[1]) / (weight[0] - weight[1]).norm()
    side = (noise_pictures(0, slice(0, 1), images)[0] * across).sum().sign()
    images[0] -= ((images[0] * across).sum() + 1e-9 * side) * across
    evidence = explained(model, images, targets % 2, "gradient")
    values, reasons = measured(evidence, "stability", samples=1)
    assert reasons == ("the prediction flips on every noisy copy", None)
    assert values.isnan().tolist() == [True, False]


def test_a_map_that_vanishes_under_noise_counts_as_zeros() -> None:
    images, targets = pictures(2)
    images[:, 0, 0, 0] = torch.tensor([0.01, 40.0])
    evidence = explained(corner(torch.relu), images, 0 * targets, "gradient")
    values, reasons = measured(evidence, "stability", samples=8, sigma=0.1)
    noise = 0.1 * noise_pictures(0, slice(0, 8), images)
    vanished = noise[noise[:, 0, 0, 0] < -0.01]
    assert reasons == (None, None)
    # The clean map is 1 on one pixel and 0 elsewhere.
    assert float(values[0]) == pytest.approx(float((1 / vanished.flatten(1).norm(dim=1)).max()), rel=1e-6)
    assert float(values[1]) == 0


def test_flipped_copies_are_not_explained_and_passes_stay_small() -> None:
    images, targets = pictures(6)
    evidence = explained(undecided(tiny_cnn(), images), images, targets, "gradient", batch_size=4)
    flipped = sum(slow_stability(evidence, row, SIGMA[tiny_cnn])[1] for row in range(6))
    passes = Passes(evidence.model)
    measured(evidence, "stability", samples=SAMPLES, sigma=SIGMA[tiny_cnn])
    # The clean images, all copies to see which flip, and an explanation of those that do not.
    assert sum(passes.sizes) == 6 + 6 * SAMPLES + (6 * SAMPLES - flipped)
    assert flipped > 0
    assert max(passes.sizes) <= 4


def test_noise_is_standard_normal_and_nobody_elses() -> None:
    images, _ = pictures(1)
    noise = noise_pictures(0, slice(0, 20), images)
    assert noise.shape == (20, *images.shape[1:])
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 0.001
    assert scipy.stats.kstest(uniform(noise).flatten(), scipy.stats.uniform(-1, 2).cdf).pvalue > 0.001
    assert float(uniform(noise).abs().max()) <= 1
    torch.testing.assert_close(noise[5:7], noise_pictures(0, slice(5, 7), images))
    assert not torch.equal(noise, noise_pictures(1, slice(0, 20), images))
    # SmoothGrad with the same seed must not average over the very noise that its maps are judged by.
    other = sample_noise(0, slice(0, 20), 1, images)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_options_are_checked() -> None:
    images, targets = pictures(1)
    evidence = explained(tiny_vit(), images, targets, "gradient")
    for options, told in (
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
        ({"sigma": 0.0}, "sigma: expected a standard deviation > 0, got 0.0"),
    ):
        with pytest.raises(UsageError, match=told):
            measured(evidence, "stability", **options)
    evidence.explainer = None
    with pytest.raises(UsageError, match="needs the method itself: give Evidence an Explainer"):
        measured(evidence, "stability")


@pytest.mark.shared
def test_more_noise_moves_the_ranks_of_a_real_photograph_further(shared_data) -> None:  # type: ignore[no-untyped-def]
    spec = ModelSpec(
        "deit_tiny_patch16_224", checkpoint=str(shared_data / "models" / "deit_tiny_patch16_224.safetensors")
    )
    model = load_classifier(spec)
    photograph = min((shared_data / "imagenet-sample" / "images").rglob("*.jpg"))
    images = model.preprocess(Image.open(photograph)).unsqueeze(0)
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    rows = torch.arange(224).view(-1, 1) // 56 * 4 + torch.arange(224) // 56
    evidence = explained(model, images, targets, "input_x_gradient", parts=rows.unsqueeze(0))
    little, much = (measured(evidence, "rank_stability", samples=3, sigma=sigma)[0] for sigma in (0.001, 0.1))
    assert 1 > float(little) > float(much) > -1
    smooth = explained(model, images, targets, "grad_cam")
    rough = explained(model, images, targets, "gradient")
    steady, shaky = (float(measured(one, "avg_sensitivity", samples=2)[0]) for one in (smooth, rough))
    assert 0 < steady < shaky
