"""IROF against a slow twin, and what bounds and voids it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_curves import Counted, part_groups, slow_area, slow_curve
from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.baselines import Baseline, make_baseline
from xai_core.errors import UsageError


def maps_of(count: int) -> Tensor:
    return torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_agrees_with_a_slow_twin(build, baseline: str) -> None:  # type: ignore[no-untyped-def]
    model = build()
    images, targets = pictures(2)
    maps, parts = maps_of(2), quarters(2)
    fast = evaluate(model, images, targets, maps, parts, chosen("irof", baseline=baseline), batch_size=2)
    (values,) = fast.values.values()
    for b in range(2):
        end = make_baseline(Baseline(baseline), model, images[b : b + 1])[0].numpy()  # type: ignore[arg-type]
        present = [part for part in parts[b].unique().tolist() if part < 255]
        scores = {part: float(maps[b].double()[parts[b] == part].mean()) for part in present}
        curve = slow_curve(model, images[b].numpy(), end, part_groups(parts[b].numpy(), scores), int(targets[b]))
        share = [p / curve[0] for p in curve]
        expected = 1 - slow_area([k / len(present) for k in range(len(present) + 1)], share)
        assert float(values[b]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert expected < 1


def test_parts_whose_removal_changes_nothing_score_zero() -> None:
    """Where the clean probability stays throughout there is no area over its curve."""
    _, targets = pictures(2)
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)
    result = evaluate(tiny_vit(), images, targets, maps_of(2), quarters(2), chosen("irof"))
    torch.testing.assert_close(result.values["irof"], torch.zeros(2, dtype=torch.float64))


def test_the_curve_is_that_of_part_deletion() -> None:
    counted = Counted(tiny_vit())
    images, targets = pictures(2)
    wanted = chosen("irof") + chosen("p_deletion", "p_aopc", baseline="mean")
    result = evaluate(counted.model, images, targets, maps_of(2), quarters(2), wanted)
    # Clean and baseline once an image, and K - 1 steps between them.
    assert counted.images == 2 * 2 + (4 - 1) + (3 - 1)
    assert list(result.curves) == ["part_deletion[mean]"]
    clean = result.curves["part_deletion[mean]"].prob[:, 0]
    expected = 1 - result.values["p_deletion[baseline=mean]"] / clean
    torch.testing.assert_close(result.values["irof"], expected)


def test_undefined_values_say_why() -> None:
    model = tiny_vit()
    images, targets = pictures(4)
    with torch.no_grad():
        model.module.head.weight.mul_(1e4)
        targets[3] = model(images[3:]).argmin()
    maps, parts = maps_of(4), quarters(4)
    maps[0], parts[1], maps[2, 0, 0] = 1.0, 0, float("nan")
    result = evaluate(model, images, targets, maps, parts, chosen("irof"))
    assert result.reasons["irof"] == (
        "all parts score the same",
        "fewer than two parts",
        "the map is not finite",
        "the clean probability is 0",
    )
    assert result.values["irof"].isnan().all() and not result.broken["irof"].any()


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = tiny_vit()
    images, targets = pictures(3)
    maps, parts = maps_of(3), quarters(3)
    together = evaluate(model, images, targets, maps, parts, chosen("irof"), batch_size=64).values["irof"]
    for b in range(3):
        one = slice(b, b + 1)
        alone = evaluate(model, images[one], targets[one], maps[one], parts[one], chosen("irof"), batch_size=1)
        torch.testing.assert_close(alone.values["irof"][0], together[b], rtol=1e-9, atol=1e-12)


def test_parts_and_options_are_checked() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="'irof' needs part labels"):
        evaluate(tiny_vit(), images, targets, maps_of(1), None, chosen("irof"))
    with pytest.raises(UsageError, match="sigma: nothing reads it with baseline 'mean'"):
        chosen("irof", sigma=3.0)
    assert evaluate(
        tiny_vit(), images, targets, maps_of(1), quarters(1), chosen("irof", baseline="blur", sigma=3.0)
    ).values.keys() == {"irof[baseline=blur,sigma=3.0]"}
