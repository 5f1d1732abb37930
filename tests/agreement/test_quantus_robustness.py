"""Agreement of the metrics of robustness with Quantus and Captum, and the places where theirs are others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from captum.metrics import sensitivity_max
from torch import Tensor, nn

from tests.xai_core.metrics.explaining import corner, explained, linear, measured, root, undecided
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.metrics import Evidence
from xai_core.metrics.robustness.noise import noise_pictures
from xai_core.metrics.robustness.sensitivity import uniform
from xai_core.metrics.robustness.stability import over_peak
from xai_core.models import Classifier

SAMPLES = 5
SMOOTH: tuple[Callable[[], Classifier], ...] = (tiny_vit, tiny_cnn)
smooth = pytest.mark.parametrize("build", SMOOTH, ids=lambda one: one.__name__)

LIPSCHITZ: dict[str, Any] = {"noise": lambda normal: 0.1 * normal}
SENSITIVITY: dict[str, Any] = {"noise": lambda normal: 0.02 * uniform(normal)}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class InDouble(nn.Module):
    """Quantus gives models float32; the tiny ones are in float64."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.double())


def in_quantus(
    metric: Callable[..., Any],
    evidence: Evidence,
    noise: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> np.ndarray:
    """A Quantus metric of the same maps and explainer; by ``noise`` of the normal draws that ours takes."""
    drawn = 0

    def move(arr: np.ndarray, **_: Any) -> np.ndarray:
        nonlocal drawn
        sample = drawn % SAMPLES
        drawn += 1
        assert noise is not None
        return arr + noise(noise_pictures(0, slice(sample, sample + 1), evidence.images)).flatten().numpy()

    def explain(model: Any, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        assert evidence.explainer is not None
        images = torch.as_tensor(inputs, dtype=torch.float64)
        return evidence.explainer.maps(evidence.model, images, torch.as_tensor(targets)).double().numpy()

    changed = {} if noise is None else {"perturb_func": move}
    built = metric(nr_samples=SAMPLES, disable_warnings=True, **changed, **options)
    return np.array(
        built(
            model=InDouble(evidence.model.module).eval(),
            x_batch=evidence.images.numpy(),
            y_batch=evidence.targets.numpy(),
            a_batch=evidence.maps.double().numpy(),
            explain_func=explain,
            channel_first=True,
            batch_size=batch_size,
        )
    )


def ours(evidence: Evidence, name: str, **options: Any) -> np.ndarray:
    return measured(evidence, name, samples=SAMPLES, **options)[0].numpy()


def one_by_one(metric: Callable[..., Any], evidence: Evidence, **options: Any) -> np.ndarray:
    """A Quantus metric of every image in a call of its own."""
    rows = [slice(row, row + 1) for row in range(len(evidence))]
    singles = [
        Evidence(
            evidence.model,
            evidence.images[row],
            evidence.targets[row],
            evidence.maps[row],
            explainer=evidence.explainer,
        )
        for row in rows
    ]
    return np.concatenate([in_quantus(metric, single, **options) for single in singles])


@smooth
def test_stability_is_quantus_local_lipschitz_estimate_of_one_image(build: Callable[[], Classifier]) -> None:
    images, targets = pictures(3)
    evidence = explained(build(), images, targets, "gradient")
    theirs = one_by_one(quantus.LocalLipschitzEstimate, evidence, **LIPSCHITZ)
    np.testing.assert_allclose(theirs, ours(evidence, "stability"), rtol=1e-5)


@smooth
def test_sensitivities_are_those_of_quantus(build: Callable[[], Classifier]) -> None:
    images, targets = pictures(3)
    evidence = explained(build(), images, targets, "gradient")
    for name, metric in (
        ("avg_sensitivity", quantus.AvgSensitivity),
        ("max_sensitivity", quantus.MaxSensitivity),
    ):
        theirs = in_quantus(metric, evidence, batch_size=3, **SENSITIVITY)
        np.testing.assert_allclose(theirs, ours(evidence, name), rtol=1e-5)


def test_quantus_normalises_over_the_batch_by_default() -> None:
    """One large map shrinks its neighbours, and given maps are scaled unlike those explained again."""
    images, targets = pictures(2)
    images[1] *= 20
    evidence = explained(tiny_cnn(), images, targets, "input_x_gradient")
    expected = ours(evidence, "stability")
    np.testing.assert_allclose(
        one_by_one(quantus.LocalLipschitzEstimate, evidence, **LIPSCHITZ), expected, rtol=1e-5
    )
    together = in_quantus(quantus.LocalLipschitzEstimate, evidence, batch_size=2, **LIPSCHITZ)
    peaks = evidence.maps.abs().amax(dim=(1, 2))
    assert float(peaks[1] / peaks[0]) > 3
    assert together[0] < expected[0] / 2
    # In batches of one the given maps are still divided by the peak of all, the new ones by their own.
    apart = in_quantus(quantus.LocalLipschitzEstimate, evidence, batch_size=1, **LIPSCHITZ)
    assert apart[0] > expected[0] * 4


def test_quantus_counts_flipped_copies_or_drops_the_image() -> None:
    """We leave out the copies whose prediction flips and keep the image."""
    images, targets = pictures(8)
    evidence = explained(undecided(tiny_vit(), images), images, targets, "gradient")

    def noise(normal: Tensor) -> Tensor:
        return 0.8 * uniform(normal)

    expected = ours(evidence, "avg_sensitivity", radius=0.8)
    with_flips = in_quantus(quantus.AvgSensitivity, evidence, noise=noise, batch_size=8)
    dropped = in_quantus(
        quantus.AvgSensitivity, evidence, noise=noise, batch_size=8, return_nan_when_prediction_changes=True
    )
    steady = ~np.isnan(dropped)
    np.testing.assert_allclose(dropped[steady], expected[steady], rtol=1e-5)
    partly = np.isnan(dropped) & ~np.isnan(expected)
    assert partly.any()
    assert (np.abs(with_flips[partly] - expected[partly]) > 1e-3 * expected[partly]).all()


def test_quantus_takes_a_ball_ten_times_as_wide_by_default() -> None:
    images, targets = pictures(4)
    evidence = explained(linear(), 10 * images, targets % 3, "input_x_gradient")
    theirs = in_quantus(quantus.AvgSensitivity, evidence, batch_size=4)
    np.testing.assert_allclose(theirs, 10 * ours(evidence, "avg_sensitivity"), rtol=0.1)


def test_a_map_of_zeros_is_infinitely_sensitive_to_quantus_and_is_no_share_to_captum() -> None:
    """Ours is null. Captum divides by 1 instead of the norm: its number is no share of anything."""
    images, targets = pictures(2)
    evidence = explained(linear(), images, targets % 3, "gradient")
    norm = float(evidence.maps[0].double().norm())
    evidence.maps[0] = 0.0
    theirs = in_quantus(quantus.MaxSensitivity, evidence, batch_size=2, **SENSITIVITY)
    assert np.isinf(theirs[0])
    assert in_captum(evidence)[0] == pytest.approx(norm, rel=1e-5)
    _, reasons = measured(evidence, "max_sensitivity", samples=SAMPLES)
    assert reasons == ("the map is zero", None)


def test_quantus_passes_over_maps_that_are_not_finite() -> None:
    images, targets = pictures(1)
    images[:, 0, 0, 0] = 0.001
    evidence = explained(corner(root), images, 0 * targets, "gradient")
    theirs = in_quantus(quantus.MaxSensitivity, evidence, **SENSITIVITY)
    assert np.isfinite(theirs[0])
    _, reasons = measured(evidence, "max_sensitivity", samples=SAMPLES)
    assert reasons == ("the map of a noisy copy is not finite",)


def in_captum(evidence: Evidence, radius: float = 0.02) -> list[float]:
    """Captum's maximum sensitivity of the same maps, explainer and noise."""
    assert evidence.explainer is not None
    explainer = evidence.explainer
    noise = radius * uniform(noise_pictures(0, slice(0, SAMPLES), evidence.images))

    def explain(inputs: Any) -> Tensor | tuple[Tensor]:
        if isinstance(inputs, tuple):
            return (evidence.maps.double(),)
        targets = evidence.targets.repeat_interleave(SAMPLES)
        return explainer.maps(evidence.model, inputs, targets).double()

    return sensitivity_max(
        explain,
        evidence.images,
        perturb_func=lambda inputs: inputs + noise.repeat(len(evidence), 1, 1, 1),
        n_perturb_samples=SAMPLES,
    ).tolist()


@smooth
def test_max_sensitivity_is_captums(build: Callable[[], Classifier]) -> None:
    images, targets = pictures(3)
    evidence = explained(build(), images, targets, "gradient")
    np.testing.assert_allclose(in_captum(evidence), ours(evidence, "max_sensitivity"), rtol=1e-5)


def test_captum_counts_flipped_copies() -> None:
    images, targets = pictures(8)
    evidence = explained(undecided(tiny_vit(), images), images, targets, "gradient")
    expected = ours(evidence, "max_sensitivity", radius=0.8)
    theirs = np.array(in_captum(evidence, radius=0.8))
    known = ~np.isnan(expected)
    assert (theirs[known] >= expected[known] * (1 - 1e-5)).all()
    assert (theirs[known] > expected[known] * 1.001).any()


def test_normalised_maps_need_no_clamp() -> None:
    """iERF clamps attributions to [-1, 1]; over their peak they lie there already."""
    maps = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    assert torch.equal(over_peak(maps), over_peak(maps).clamp(-1, 1))
    by_quantus = np.stack([quantus.normalise_by_max(one) for one in maps.double().numpy()])
    np.testing.assert_allclose(over_peak(maps).numpy(), by_quantus, rtol=1e-12)
