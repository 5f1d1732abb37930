"""Agreement with Quantus: faithfulness correlation at equal draws, and what its own draws and baseline change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import quantus
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.metrics.perturbation.faithfulness_correlation import FaithfulnessCorrelationOptions, draw_pixels
from xai_core.models import Classifier

NAME = "faithfulness_correlation"
QUIET: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False}


def explained(build: Any = tiny_vit) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """A model with three pictures, their targets and random maps, in float32: all that Quantus' models take."""
    model = build()
    model.module.float()
    images, targets = pictures(3)
    maps = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return model, images.float(), targets, maps


def theirs(model: Classifier, images: Tensor, targets: Tensor, maps: Tensor, **options: Any) -> list[float]:
    metric = quantus.FaithfulnessCorrelation(**{"return_aggregate": False, **options}, **QUIET)
    batch = {"x_batch": images.numpy(), "y_batch": targets.numpy(), "a_batch": maps.numpy()}
    return metric(model=model.module, **batch, channel_first=True)


def ours(model: Classifier, images: Tensor, targets: Tensor, maps: Tensor, **options: Any) -> Any:
    return evaluate(model, images, targets, maps, None, chosen(NAME, **options))


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_equal_draws_give_equal_correlations(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets, maps = explained(build)
    options = FaithfulnessCorrelationOptions(pixels=100, samples=20)
    drawn = draw_pixels(SIZE * SIZE, options).numpy()
    calls = iter(range(options.samples * len(images)))

    def all_channels_of_our_pixels(features: int, size: int, replace: bool) -> np.ndarray:
        pixels = drawn[next(calls) // len(images)]
        assert (features, size, replace) == (3 * SIZE * SIZE, 3 * options.pixels, False)
        return np.concatenate([channel * SIZE * SIZE + pixels for channel in range(3)])

    monkeypatch.setattr(np.random, "choice", all_channels_of_our_pixels)
    expected = theirs(model, images, targets, maps, nr_runs=20, subset_size=300, perturb_baseline=0.0)
    (values,) = ours(model, images, targets, maps, pixels=100, samples=20).values.values()
    # Their drops are differences of float32 logits.
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)


def test_theirs_perturbs_single_channels_by_the_images_least_value() -> None:
    model, images, targets, maps = explained()
    seen: list[np.ndarray] = []
    model.module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].numpy()))
    theirs(model, images[:1], targets[:1], maps[:1], nr_runs=2, subset_size=200)
    clean, perturbed = images[0].numpy(), seen[-1][0]
    changed = perturbed != clean
    np.testing.assert_allclose(perturbed[changed], clean.min())
    # 200 values of as many pixels, hardly one of which loses all three channels.
    assert changed.sum() >= 199
    assert changed.any(axis=0).sum() > 150
    assert changed.all(axis=0).sum() < 5
    seen.clear()
    ours(model, images[:1], targets[:1], maps[:1], samples=3)
    perturbed = seen[0][0]
    changed = perturbed != clean
    assert (perturbed[changed] == 0).all()
    assert changed.any(axis=0).sum() == changed.all(axis=0).sum() == 200


def test_their_draws_depend_on_the_neighbours_in_the_batch() -> None:
    model, images, targets, maps = explained()
    np.random.seed(0)
    together = theirs(model, images, targets, maps)[1]
    np.random.seed(0)
    (alone,) = theirs(model, images[1:2], targets[1:2], maps[1:2])
    assert abs(together - alone) > 0.01
    both = ours(model, images, targets, maps).values[NAME][1]
    assert float(ours(model, images[1:2], targets[1:2], maps[1:2]).values[NAME][0]) == pytest.approx(
        float(both), abs=1e-5
    )


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_one_constant_map_takes_their_default_mean_away() -> None:
    model, images, targets, maps = explained()
    maps[1] = 0.3
    assert np.isnan(theirs(model, images, targets, maps)).tolist() == [False, True, False]
    assert np.isnan(theirs(model, images, targets, maps, return_aggregate=True)).tolist() == [True]
    result = ours(model, images, targets, maps)
    assert result.values[NAME].isnan().tolist() == [False, True, False]
    assert result.reasons[NAME] == (None, "the map is constant", None)
