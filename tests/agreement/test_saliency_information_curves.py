"""Agreement of AIC and SIC with PAIR's ``saliency``, and where its curves are read off otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from saliency.metrics import pic
from torch import Tensor

from tests.xai_core.measuring import chosen
from tests.xai_core.metrics.test_information_curves import case, seen, split_model
from xai_core.baselines import gaussian_blur
from xai_core.metrics import Evaluation, Evidence, evaluate
from xai_core.metrics.perturbation.information_curves import InformationOptions, seed_mask
from xai_core.models import Classifier, ModelSpec, load_classifier

THRESHOLDS = InformationOptions().thresholds


@pytest.fixture(scope="module")
def model() -> Classifier:
    return split_model()


@pytest.fixture
def integral(monkeypatch: pytest.MonkeyPatch) -> None:
    """PAIR calls ``numpy.trapz``, which NumPy 2.4 has no more."""
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)


def answer(model: Classifier, target: int, score: str) -> Callable[[np.ndarray], np.ndarray]:
    """PAIR's view of a model: uint8 pictures to scores."""

    def predict(pictures: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(seen(model, pictures).to(model.dtype)).double()
        return (logits.softmax(1)[:, target] if score == "sic" else (logits.argmax(1) == target).double()).numpy()

    return predict


def theirs(model: Classifier, picture: np.ndarray, map_: Tensor, target: int, score: str, **more: Any) -> Any:
    settings = {"min_pred_value": 0.0, "num_data_points": 1000, **more}
    seeds = seed_mask(*map_.shape, InformationOptions())
    predict = answer(model, target, score)
    return pic.compute_pic_metric(picture, map_.double().numpy(), seeds, predict, THRESHOLDS, **settings)


def ours(model: Classifier, images: Tensor, targets: Tensor, maps: Tensor) -> Evaluation:
    return evaluate(Evidence(model, images, targets, maps), chosen("aic", "sic"))


@pytest.mark.usefixtures("integral")
@pytest.mark.parametrize("score", ["aic", "sic"])
def test_the_area_is_the_limit_of_theirs(model: Classifier, score: str) -> None:
    """They sum over a grid of levels, we integrate: the finer theirs, the nearer."""
    pictures, images, targets, maps = case(model, 2)
    values = ours(model, images, targets, maps).values[score]
    for b in range(2):
        gaps = [
            abs(
                theirs(model, pictures[b], maps[b], int(targets[b]), score, num_data_points=levels).auc
                - float(values[b])
            )
            for levels in (100, 5_000)
        ]
        assert gaps[0] < 2e-2 and gaps[1] < 4e-4


@pytest.mark.usefixtures("integral")
def test_pictures_and_answers_are_theirs(model: Classifier) -> None:
    """The same seeds, thresholds, interpolation and codec, to the last byte."""
    pictures, images, targets, maps = case(model, 2)
    evidence = Evidence(model, images, targets, maps)
    asked: list[np.ndarray] = []
    forward = evidence.forward

    def watched(build: Callable[[slice], Tensor], owner: Tensor, read: Any) -> Tensor:
        asked.append((model.denormalise(build(slice(0, len(owner)))) * 255).round().permute(0, 2, 3, 1).numpy())
        return forward(build, owner, read)

    evidence.forward = watched  # type: ignore[method-assign]
    evaluate(evidence, chosen("sic"))
    (shown,) = asked
    for b in range(2):
        result = theirs(model, pictures[b], maps[b], int(targets[b]), "sic")
        expected = np.stack(result.blurred_images)
        np.testing.assert_array_equal(shown.reshape(2, -1, *expected.shape[1:])[b], expected)


@pytest.mark.usefixtures("integral")
@pytest.mark.shared
def test_a_photograph(shared_data: Path) -> None:
    """A trained network and a smooth map; they sum over a grid of 1000 levels."""
    path = shared_data / "models" / "mobilenetv2_100.safetensors"
    size = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    spec = ModelSpec("mobilenetv2_100", checkpoint=str(path), create_args={"pad_type": "same"}, transform=size)
    model = load_classifier(spec)
    file = sorted((shared_data / "imagenet-sample" / "images").glob("*/*.jpg"))[2]
    pictures = np.asarray(Image.open(file).convert("RGB").resize((96, 96)))[None]
    images = seen(model, pictures).float()
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    noise = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = gaussian_blur(noise, 8.0)[:, 0]
    for score, values in ours(model, images, targets, maps).values.items():
        area = theirs(model, pictures[0], maps[0], int(targets[0]), score).auc
        assert float(values[0]) == pytest.approx(area, abs=2e-3), score


@pytest.mark.usefixtures("integral")
def test_pictures_that_cost_nothing_count(model: Classifier) -> None:
    """A picture that compresses no worse than the blurred one and is recognised: PAIR's (0, 0) comes behind it.

    So their curve starts from 0 all the same; ours from what is reached without any information.
    """
    pictures, images, targets, maps = case(model, 5)
    value = float(ours(model, images, targets, maps).values["aic"][4])
    result = theirs(model, pictures[4], maps[4], int(targets[4]), "aic")
    sizes = [pic.estimate_image_entropy(one) for one in result.blurred_images]
    free = [b for b, size in enumerate(sizes) if b and size <= sizes[0]]
    assert free and all(result.predictions[b] == 1.0 for b in free)
    assert value == pytest.approx(1.0)
    assert result.auc == pytest.approx(0.941, abs=5e-3)


@pytest.mark.usefixtures("integral")
def test_ties_reveal_no_more_than_their_share(model: Classifier) -> None:
    """A map that is 0 but for a few pixels: at a quantile of 0 PAIR reveals everything, we the share asked for."""
    pictures, images, targets, maps = case(model, 1)
    blob = gaussian_blur(maps[:, None].double(), 4.0)[:, 0]
    sparse = (blob - blob.flatten().quantile(0.92)).relu()
    value = float(ours(model, images, targets, sparse).values["sic"])
    result = theirs(model, pictures[0], sparse[0], int(targets[0]), "sic")
    whole = [np.array_equal(one, pictures[0]) for one in result.blurred_images]
    assert whole == [False] * (1 + sum(one < 0.08 for one in THRESHOLDS)) + [True] * (
        sum(one > 0.08 for one in THRESHOLDS) + 1
    )
    assert abs(value - result.auc) > 0.01


@pytest.mark.usefixtures("integral")
def test_they_leave_out_what_we_leave_out_and_what_is_not_confident(model: Classifier) -> None:
    pictures, images, targets, maps = case(model, 2)
    images[1] = images[1, :, :1, :1]
    pictures[1] = pictures[1, :1, :1]
    result = ours(model, images, targets, maps)
    assert result.reasons["sic"][1] is not None
    with pytest.raises(pic.ComputePicMetricError):
        theirs(model, pictures[1], maps[1], int(targets[1]), "sic")
    with torch.no_grad():
        clean = float(model(images[:1]).softmax(1)[0, targets[0]])
    assert result.reasons["sic"][0] is None
    with pytest.raises(pic.ComputePicMetricError, match="lower than `min_pred_value`"):
        theirs(model, pictures[0], maps[0], int(targets[0]), "sic", min_pred_value=clean + 1e-3)


@pytest.mark.skipif(hasattr(np, "trapz"), reason="this NumPy still has trapz")
def test_they_do_not_run_with_numpy_2_4(model: Classifier) -> None:
    pictures, _, targets, maps = case(model, 1)
    with pytest.raises(AttributeError, match="trapz"):
        theirs(model, pictures[0], maps[0], int(targets[0]), "aic")
