"""AIC and SIC against a slow twin, the pictures they show, and what voids them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import LinearNDInterpolator
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.metrics.test_curves import Counted
from tests.xai_core.tiny import tiny_relu_cnn
from xai_core.errors import UsageError
from xai_core.metrics.perturbation.curves import area
from xai_core.metrics.perturbation.information_curves import (
    InformationOptions,
    bokeh,
    encoded_size,
    monotone_curve,
    revealed_pixels,
    sampled,
    seed_mask,
)
from xai_core.metrics.trajectory import Curve
from xai_core.models import Classifier
from xai_core.synthetic import render

SIZE = 40
FEW = {"thresholds": (0.05, 0.2, 0.6)}


def drawn(count: int) -> np.ndarray:
    """Scenes with objects, uint8 ``[n, SIZE, SIZE, 3]``."""
    scenes = [Image.fromarray(render(0, index).image) for index in range(count)]
    return np.stack([np.asarray(scene.resize((SIZE, SIZE))) for scene in scenes])


def seen(model: Classifier, pictures: np.ndarray) -> Tensor:
    return model.normalise(torch.tensor(pictures).permute(0, 3, 1, 2).double() / 255)


def split_model() -> Classifier:
    """A random network whose first two classes are fitted to tell whole pictures from blurred ones."""
    model = tiny_relu_cnn()
    pictures = drawn(6)
    known = seed_mask(SIZE, SIZE, InformationOptions())
    both = np.concatenate([pictures, [bokeh(picture, known) for picture in pictures]])
    with torch.no_grad():
        features = model.module.forward_head(model.module.forward_features(seen(model, both)), pre_logits=True)
        design = torch.cat([features, torch.ones(12, 1).double()], dim=1)
        fitted = torch.linalg.lstsq(design, torch.tensor([2.0] * 6 + [-2.0] * 6).double()).solution
        model.module.fc.weight.zero_()
        model.module.fc.bias.fill_(-9.0)
        for row, sign in ((0, 1.0), (1, -1.0)):
            model.module.fc.weight[row], model.module.fc.bias[row] = sign * fitted[:-1], sign * fitted[-1]
    return model


@pytest.fixture(scope="module")
def model() -> Classifier:
    return split_model()


def case(model: Classifier, count: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    pictures = drawn(count)
    images = seen(model, pictures)
    maps = torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return pictures, images, model(images).argmax(dim=1), maps


def slow_picture(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Channel by channel, pixel by pixel."""
    filled = picture.copy()
    places = np.argwhere(known)
    for channel in range(3):
        plane = LinearNDInterpolator(places, picture[..., channel][known].astype(float))
        for y, x in np.argwhere(~known):
            filled[y, x, channel] = round(float(np.float32(plane(y, x).item())))
    return filled


def slow_size(picture: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, quality=100)
    return len(buffer.getvalue())


def slow_values(
    model: Classifier, picture: np.ndarray, map_: np.ndarray, target: int, seeds: np.ndarray
) -> tuple[float, float]:
    """AIC and SIC of one picture: the best score with no more than so much information, point by point."""
    shown = [slow_picture(picture, seeds)]
    for threshold in FEW["thresholds"]:
        shown.append(slow_picture(picture, seeds | (map_ >= np.quantile(map_, 1 - threshold))))
    shown.append(picture)
    sizes = [slow_size(one) for one in shown]
    with torch.no_grad():
        answers = [model(seen(model, one[None]))[0] for one in shown]
    values = []
    for score in (
        [float(answer.argmax() == target) for answer in answers],
        [float(answer.softmax(0)[target]) for answer in answers],
    ):
        points = [
            (
                min(max((size - sizes[0]) / (sizes[-1] - sizes[0]), 0), 1),
                min(max((one - score[0]) / (score[-1] - score[0]), 0), 1),
            )
            for size, one in zip(sizes, score, strict=True)
        ]
        points = sorted(points)
        best = [max(y for _, y in points[: index + 1]) for index in range(len(points))]
        values.append(float(np.trapezoid(best, [x for x, _ in points])))
    return values[0], values[1]


def test_both_agree_with_a_slow_twin(model: Classifier) -> None:
    pictures, images, targets, maps = case(model, 3)
    result = evaluate(model, images, targets, maps, None, chosen("aic", "sic", **FEW), batch_size=4)
    seeds = seed_mask(SIZE, SIZE, InformationOptions())
    aic, sic = result.values.values()
    assert not aic.isnan().any() and not sic.isnan().any()
    assert len(set(aic.tolist())) > 1
    for b in range(3):
        expected = slow_values(model, pictures[b], maps[b].numpy(), int(targets[b]), seeds)
        assert float(aic[b]) == pytest.approx(expected[0], abs=1e-9)
        assert float(sic[b]) == pytest.approx(expected[1], abs=1e-9)


def test_pictures_are_shown_once_for_both() -> None:
    counted = Counted(split_model())
    _, images, targets, maps = case(counted.model, 2)
    counted.images = 0
    result = evaluate(counted.model, images, targets, maps, None, chosen("aic", "sic", **FEW))
    assert counted.images == 2 * (3 + 2)
    assert list(result.values) == ["aic[thresholds=0.05+0.2+0.6]", "sic[thresholds=0.05+0.2+0.6]"]
    assert list(result.curves) == list(result.values)
    for curve in result.curves.values():
        assert curve.prob.shape == (2, 101)
        torch.testing.assert_close(curve.fraction, torch.linspace(0, 1, 101).double().expand(2, -1))
        assert (curve.prob.diff(dim=1) >= 0).all()
        assert (curve.prob[:, -1] == 1).all()


def test_a_batch_equals_its_images_one_by_one(model: Classifier) -> None:
    _, images, targets, maps = case(model, 3)
    wanted = chosen("aic", "sic", **FEW)
    together = evaluate(model, images, targets, maps, None, wanted, batch_size=64).values
    for b in range(3):
        one = slice(b, b + 1)
        alone = evaluate(model, images[one], targets[one], maps[one], None, wanted, batch_size=1).values
        for name, values in together.items():
            torch.testing.assert_close(alone[name][0], values[b], rtol=1e-9, atol=1e-12)


def test_undefined_values_say_why(model: Classifier) -> None:
    _, images, targets, maps = case(model, 5)
    maps[0], maps[1, 0, 0] = 0.5, float("nan")
    with torch.no_grad():
        targets[2] = model(images[2:3]).argmin()
    images[3] = images[3, :, :1, :1]
    targets[3] = model(images[3:4]).argmax()
    result = evaluate(model, images, targets, maps, None, chosen("aic", "sic", **FEW))
    for name, reasons in result.reasons.items():
        assert reasons == (
            "the map is constant",
            "the map is not finite",
            "the prediction is not the target",
            "the blurred picture holds as much information",
            None,
        )
        assert not result.broken[name].any()
        assert result.curves[name].prob.isnan().all(dim=1).tolist() == [True] * 4 + [False]


def test_what_is_recognised_blurred_gains_no_accuracy() -> None:
    """A network that always gives the same class."""
    model = tiny_relu_cnn()
    _, images, _, maps = case(model, 1)
    with torch.no_grad():
        model.module.fc.weight.mul_(1e-3)
        model.module.fc.bias[4] = 9.0
    result = evaluate(model, images, torch.tensor([4]), maps, None, chosen("aic", **FEW))
    assert next(iter(result.reasons.values())) == ("the blurred picture scores as high",)


def test_an_answer_that_is_no_number_is_broken(model: Classifier) -> None:
    """And not one more undefined value: nothing in the definition accounts for it."""
    _, images, targets, maps = case(model, 1)
    broken = tiny_relu_cnn()
    with torch.no_grad():
        broken.module.fc.bias.fill_(float("nan"))
    result = evaluate(broken, images, targets, maps, None, chosen("aic", "sic", **FEW))
    assert all(broken.all() for broken in result.broken.values())


def test_seeds_are_drawn_once_for_all() -> None:
    mask = seed_mask(50, 40, InformationOptions())
    assert np.array_equal(mask, seed_mask(50, 40, InformationOptions()))
    assert not np.array_equal(mask, seed_mask(50, 40, InformationOptions(seed=1)))
    assert 20 <= mask.sum() <= 24
    assert mask[0, 0] and mask[0, -1] and mask[-1, 0] and mask[-1, -1]
    assert seed_mask(50, 40, InformationOptions(seed_fraction=0.0)).sum() == 4


def test_a_plane_of_colour_is_regained_from_its_corners() -> None:
    y, x = np.mgrid[:21, :31]
    plane = np.stack([5 * y, 3 * x, 2 * y + x], axis=-1).astype(np.uint8)
    corners = seed_mask(21, 31, InformationOptions(seed_fraction=0.0))
    assert np.array_equal(bokeh(plane, corners), plane)
    assert np.array_equal(bokeh(plane, np.ones((21, 31), dtype=bool)), plane)


def test_the_codec_loses_nothing() -> None:
    (picture,) = drawn(1)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="webp", lossless=True, quality=100)
    assert np.array_equal(np.asarray(Image.open(buffer)), picture)
    assert encoded_size(picture) == len(buffer.getvalue())
    assert encoded_size(np.zeros_like(picture)) < encoded_size(picture)


@given(st.integers(4, 3000), st.floats(0.001, 0.999))
def test_as_many_pixels_as_lie_above_the_quantile(pixels: int, threshold: float) -> None:
    values = np.arange(float(pixels))
    assert revealed_pixels(pixels, threshold) == int((values >= np.quantile(values, 1 - threshold)).sum())


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=0, max_size=12)


@settings(deadline=None)
@given(points, st.randoms(use_true_random=False))
def test_curves_rise_whatever_the_order_of_their_points(inner: list[tuple[float, float]], random) -> None:  # type: ignore[no-untyped-def]
    every = [(0.0, 0.0), *inner, (1.0, 1.0)]
    curve = monotone_curve(*torch.tensor([every], dtype=torch.float64).unbind(dim=2))
    assert (curve.fraction.diff(dim=1) >= 0).all() and (curve.prob.diff(dim=1) >= 0).all()
    assert 0 <= float(area(curve)) <= 1 + 1e-12
    random.shuffle(every)
    shuffled = monotone_curve(*torch.tensor([every], dtype=torch.float64).unbind(dim=2))
    torch.testing.assert_close(area(shuffled), area(curve))
    kept = sampled(curve, 11)
    for level, value in zip(kept.fraction[0].tolist(), kept.prob[0].tolist(), strict=True):
        best = max(y for x, y in every if x <= level)
        assert value >= best - 1e-9


def test_sampling_keeps_a_jump() -> None:
    curve = Curve(torch.tensor([[0.0, 0.5, 0.5, 1.0]]), torch.tensor([[0.0, 0.2, 0.8, 1.0]]))
    torch.testing.assert_close(sampled(curve, 5).prob, torch.tensor([[0.0, 0.1, 0.8, 0.9, 1.0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5, 0.2]}, r"thresholds: expected rising numbers between 0 and 1, got \[0.5, 0.2\]"),
        ({"thresholds": [0.5, 1.0]}, "thresholds: expected rising"),
        ({"thresholds": []}, "thresholds: expected rising"),
        ({"seed_fraction": 1.0}, "seed_fraction: expected a share from 0 to below 1, got 1.0"),
        ({"seed_fraction": 0.0, "seed": 2}, "seed: nothing reads it without seed pixels"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen("aic", **options)
