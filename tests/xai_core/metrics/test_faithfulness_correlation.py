"""Faithfulness correlation against a slow numpy twin, and where it has no value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.baselines import Baseline, make_baseline
from xai_core.errors import UsageError
from xai_core.metrics.perturbation.faithfulness_correlation import FaithfulnessCorrelationOptions, draw_pixels
from xai_core.models import Classifier, ModelSpec

NAME = "faithfulness_correlation"


def maps_of(count: int) -> Tensor:
    return torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def linear_classifier() -> Classifier:
    """A linear model of the pixels, whose last class has no weights: its attributions are known exactly."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)).double()
    with torch.no_grad():
        module[1].weight[-1] = 0
    return Classifier(module, ModelSpec("linear", False, transform={"input_size": (3, SIZE, SIZE)}))


def contributions(model: Classifier, differences: Tensor, targets: Tensor) -> Tensor:
    """What each pixel's difference adds to the target's logit of a linear model: ``[B, H, W]``."""
    return (model.module[1].weight[targets].view_as(differences) * differences).sum(dim=1)


def without_head(model: Classifier) -> Classifier:
    """The same model with logits that are its biases, whatever it sees."""
    with torch.no_grad():
        model.module.get_classifier().weight.zero_()
    return model


def slow(
    model: Classifier, image: Tensor, target: int, map_: Tensor, drawn: list[list[int]], replacement: np.ndarray
) -> float:
    with torch.no_grad():
        clean = float(model(image[None])[0, target])
    sums, drops = [], []
    for pixels in drawn:
        perturbed, total = image.numpy().copy(), 0.0
        for pixel in pixels:
            y, x = divmod(pixel, SIZE)
            perturbed[:, y, x] = replacement[:, y, x]
            total += float(map_[y, x])
        with torch.no_grad():
            drops.append(clean - float(model(torch.from_numpy(perturbed)[None])[0, target]))
        sums.append(total)
    return float(np.corrcoef(sums, drops)[0, 1])


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
@pytest.mark.parametrize(
    ("options", "baseline"),
    [
        ({"pixels": 50, "samples": 12}, Baseline("mean")),
        ({"pixels": 300, "samples": 5, "baseline": "blur", "sigma": 3.0, "seed": 7}, Baseline("blur", sigma=3.0)),
        ({"pixels": 50, "samples": 6, "baseline": "noise", "seed": 2}, Baseline("noise", seed=2)),
    ],
    ids=["mean", "blur", "noise"],
)
def test_it_agrees_with_a_slow_twin(build, options: dict, baseline: Baseline) -> None:  # type: ignore[no-untyped-def]
    model = build()
    images, targets = pictures(2)
    maps = maps_of(2)
    fast = evaluate(model, images, targets, maps, None, chosen(NAME, **options), batch_size=7)
    (values,) = fast.values.values()
    drawn = draw_pixels(SIZE * SIZE, FaithfulnessCorrelationOptions(**options)).tolist()
    for b in range(2):
        replacement = make_baseline(baseline, model, images[b : b + 1])[0].numpy()
        expected = slow(model, images[b], int(targets[b]), maps[b], drawn, replacement)
        assert float(values[b]) == pytest.approx(expected, abs=1e-9)


def test_a_linear_models_contributions_are_perfectly_faithful() -> None:
    model = linear_classifier()
    images, targets = pictures(3)
    exact = contributions(model, images, targets)
    values = evaluate(model, images, targets, exact, None, chosen(NAME)).values[NAME]
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)
    opposite = evaluate(model, images, targets, -exact, None, chosen(NAME)).values[NAME]
    torch.testing.assert_close(opposite, -values)


def test_neither_scale_nor_clamping_enters() -> None:
    model, (images, targets) = tiny_vit(), pictures(2)
    maps = 100 * maps_of(2)
    options = {"pixels": 40, "samples": 8}
    (values,) = evaluate(model, images, targets, maps, None, chosen(NAME, **options)).values.values()
    per_image = maps / maps.abs().amax(dim=(1, 2), keepdim=True)
    (normalised,) = evaluate(model, images, targets, per_image, None, chosen(NAME, **options)).values.values()
    torch.testing.assert_close(values, normalised, rtol=0, atol=1e-6)
    clamped = maps.clamp(-1, 1)
    (other,) = evaluate(model, images, targets, clamped, None, chosen(NAME, **options)).values.values()
    assert not torch.allclose(values, other, atol=1e-3)


def test_draws_are_distinct_pixels_told_by_the_seed() -> None:
    options = FaithfulnessCorrelationOptions(pixels=30, samples=20, seed=5)
    drawn = draw_pixels(100, options)
    assert drawn.shape == (20, 30)
    assert all(len(set(row)) == 30 and min(row) >= 0 and max(row) < 100 for row in drawn.tolist())
    assert len({tuple(sorted(row)) for row in drawn.tolist()}) == 20
    assert torch.equal(drawn, draw_pixels(100, options))
    assert not torch.equal(drawn, draw_pixels(100, FaithfulnessCorrelationOptions(pixels=30, samples=20, seed=6)))


def test_one_forward_a_draw_and_one_for_the_image() -> None:
    model, (images, targets) = tiny_vit(), pictures(3)
    forwarded = []
    model.module.register_forward_hook(lambda _module, inputs, _output: forwarded.append(len(inputs[0])))
    evaluate(model, images, targets, maps_of(3), None, chosen(NAME, samples=9), batch_size=4)
    assert sum(forwarded) == 3 * (9 + 1)
    assert max(forwarded) == 4


def test_null_reasons() -> None:
    model, (images, targets) = tiny_vit(), pictures(4)
    wanted = chosen(NAME, pixels=20, samples=3)
    undrawn = (set(range(SIZE * SIZE)) - set(draw_pixels(SIZE * SIZE, wanted[0][1]).flatten().tolist())).pop()
    maps = maps_of(4)
    maps[1] = 0.3
    maps[2, 0, 0] = float("inf")
    maps[3] = 0.1
    maps[3].view(-1)[undrawn] = 5.0
    (name,) = (result := evaluate(model, images, targets, maps, None, wanted)).values
    assert result.reasons[name] == (
        None,
        "the map is constant",
        "the map is not finite",
        "all draws are attributed the same",
    )
    assert result.values[name].isnan().tolist() == [False, True, True, True]
    deaf = evaluate(without_head(tiny_vit()), images[:1], targets[:1], maps[:1], None, wanted)
    assert deaf.reasons[name] == ("the logit falls by the same in all draws",)


def test_a_model_without_an_answer_is_broken_not_undefined() -> None:
    model, (images, targets) = tiny_vit(), pictures(2)
    images[1] = float("nan")
    result = evaluate(model, images, targets, maps_of(2), None, chosen(NAME, samples=4))
    (broken,), (reasons,) = result.broken.values(), result.reasons.values()
    assert broken.tolist() == [False, True]
    assert reasons == (None, None)


def test_options_are_checked() -> None:
    for options, message in (
        ({"pixels": 0}, "pixels: expected at least 1, got 0"),
        ({"samples": 2}, "samples: expected at least 3"),
        ({"sigma": 0.0, "baseline": "blur"}, "sigma: expected a number of pixels > 0"),
        ({"sigma": 2.0}, "sigma: nothing reads it with baseline 'mean'"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen(NAME, **options)
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="pixels: expected fewer than the image's 1024, got 1024"):
        evaluate(tiny_vit(), images, targets, maps_of(1), None, chosen(NAME, pixels=1024))
