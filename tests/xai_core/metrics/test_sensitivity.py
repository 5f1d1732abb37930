"""Average and maximum sensitivity against a slow twin and against what is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xai_core.measuring import chosen
from tests.xai_core.metrics.explaining import Passes, corner, explained, linear, measured, root, undecided
from tests.xai_core.tiny import pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.errors import UsageError
from xai_core.metrics import Evidence
from xai_core.metrics import evaluate as measure
from xai_core.metrics.robustness.noise import noise_pictures
from xai_core.metrics.robustness.sensitivity import uniform
from xai_core.models import Classifier

SAMPLES = 4
# So much noise that some copies flip the tiny models' predictions and others do not.
RADIUS = {tiny_vit: 0.8, tiny_cnn: 0.3}


def slow_changes(evidence: Evidence, row: int, radius: float, seed: int) -> list[float]:
    """The relative change of the map on every copy that is kept, one explanation at a time."""
    model, method = evidence.model, evidence.explainer.method  # type: ignore[union-attr]
    image, target = evidence.images[row], evidence.targets[row : row + 1]
    clean, changes = evidence.maps[row].double().numpy(), []
    for sample in range(SAMPLES):
        copy = image + radius * uniform(noise_pictures(seed, slice(sample, sample + 1), evidence.images)[0])
        assert float((copy - image).abs().max()) <= radius
        if int(model(copy[None]).argmax()) == int(model(image[None]).argmax()):
            map_ = attribute(model, copy[None], target, method=method)[0].double().numpy()
            changes.append(float(np.sqrt(((map_ - clean) ** 2).sum()) / np.sqrt((clean**2).sum())))
    return changes


@pytest.mark.parametrize("build", RADIUS, ids=lambda one: one.__name__)
def test_both_agree_with_a_slow_twin(build: Callable[[], Classifier]) -> None:
    images, targets = pictures(8)
    evidence = explained(undecided(build(), images), images, targets, "gradient", batch_size=5)
    options = {"samples": SAMPLES, "radius": RADIUS[build], "seed": 3}
    average, reasons = measured(evidence, "avg_sensitivity", **options)
    highest, _ = measured(evidence, "max_sensitivity", **options)
    kept = []
    for row in range(len(images)):
        changes = slow_changes(evidence, row, RADIUS[build], seed=3)
        kept.append(len(changes))
        if changes:
            assert reasons[row] is None
            assert float(average[row]) == pytest.approx(np.mean(changes), rel=1e-5)
            assert float(highest[row]) == pytest.approx(max(changes), rel=1e-5)
        else:
            assert reasons[row] == "the prediction flips on every noisy copy"
            assert average[row].isnan()
            assert highest[row].isnan()
    assert any(0 < count < SAMPLES for count in kept), kept


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), radius=st.floats(0.001, 0.02))
def test_a_linear_model_has_a_closed_form(seed: int, radius: float) -> None:
    """Input x gradient of a linear model moves by weight x noise."""
    model = linear()
    images, _ = pictures(2)
    targets = torch.tensor([2, 0])
    evidence = explained(model, images, targets, "input_x_gradient")
    values, reasons = measured(evidence, "max_sensitivity", samples=3, radius=radius, seed=seed)
    weight = model.module.weight[targets]
    moved = radius * uniform(noise_pictures(seed, slice(0, 3), images))
    change = (weight.unsqueeze(1) * moved).sum(dim=2).flatten(2).norm(dim=2)
    norm = (weight * images).sum(dim=1).flatten(1).norm(dim=1)
    kept = model(images.unsqueeze(1).add(moved).flatten(0, 1)).argmax(dim=1).view(2, 3)
    for row in range(2):
        same = kept[row] == model(images[row : row + 1]).argmax()
        if reasons[row] is None:
            assert float(values[row]) == pytest.approx(float((change[row][same] / norm[row]).max()), rel=1e-4)
        else:
            assert not same.any()


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = tiny_vit()
    images, targets = pictures(4)
    together, _ = measured(explained(model, images, targets, "gradient"), "avg_sensitivity", samples=3)
    for row in range(4):
        one = slice(row, row + 1)
        alone = explained(model, images[one], targets[one], "gradient", batch_size=1)
        got, _ = measured(alone, "avg_sensitivity", samples=3)
        torch.testing.assert_close(got[0], together[row], rtol=1e-4, atol=0)


def test_nothing_is_explained_twice() -> None:
    images, targets = pictures(3)
    evidence = explained(tiny_cnn(), images, targets, "gradient", batch_size=4)
    passes = Passes(evidence.model)
    both = measure(evidence, chosen("avg_sensitivity", "max_sensitivity", samples=5)).values
    # The clean images, all copies to see which flip, and one explanation of each.
    assert sum(passes.sizes) == 3 + 3 * 5 + 3 * 5
    assert max(passes.sizes) <= 4
    assert bool((both["avg_sensitivity[samples=5]"] < both["max_sensitivity[samples=5]"]).all())


def test_part_methods_are_asked_with_the_clean_images_parts() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    parts = quarters(2)
    evidence = explained(model, images, targets, "kl_hessian", parts)
    values, _ = measured(evidence, "avg_sensitivity", samples=1, seed=1)
    copies = images + 0.02 * uniform(noise_pictures(1, slice(0, 1), images))
    maps = attribute(model, copies, targets, method="kl_hessian", parts=parts).double()
    expected = (maps - evidence.maps.double()).flatten(1).norm(dim=1) / evidence.maps.double().flatten(1).norm(
        dim=1
    )
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)


def test_why_there_is_no_value() -> None:
    images, targets = pictures(4)
    images[:, 0, 0, 0] = 40.0
    # Noise makes the value that the model sees negative, where its gradient is NaN.
    images[3, 0, 0, 0] = 0.001
    evidence = explained(corner(root), images, 0 * targets, "gradient")
    evidence.maps[1] = 0.0
    evidence.maps[2, 4, 5] = torch.nan
    for name in ("avg_sensitivity", "max_sensitivity"):
        values, reasons = measured(evidence, name)
        assert reasons == (
            None,
            "the map is zero",
            "the map is not finite",
            "the map of a noisy copy is not finite",
        )
        assert values.isnan().tolist() == [False, True, True, True]


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match=r"radius: expected a number > 0, got -1.0"):
        chosen("avg_sensitivity", radius=-1.0)
    with pytest.raises(UsageError, match="samples: expected at least 1, got 0"):
        chosen("max_sensitivity", samples=0)
