"""Agreement of perturbation curves, IROF and ROAD with Quantus, and what its numbers leave out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import quantus
import torch
from quantus.functions.perturb_func import noisy_linear_imputation
from torch import Tensor, nn

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import quarters, tiny_cnn
from xai_core.metrics import Evaluation
from xai_core.metrics.perturbation.linear_imputation import impute
from xai_core.models import Classifier

# Quantus wants steps that divide the pixels, and we steps of whole pixels of three channels: 24 x 24 has both.
SIZE, STEPS = 24, 24
PER_STEP = 3 * SIZE * SIZE // STEPS


@pytest.fixture(autouse=True)
def _integral(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantus calls ``numpy.trapz``, which NumPy 2.4 has no more."""
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)


@pytest.fixture(scope="module")
def model() -> Classifier:
    model = tiny_cnn()
    model.module.float()
    with torch.no_grad():
        model.module.fc.weight.mul_(0.2)
    return model


def case(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    maps = torch.randn(count, SIZE, SIZE, generator=generator)
    return images, torch.arange(count) % 5, maps, quarters(count)[:, 4:28, 4:28].contiguous()


def theirs(metric: type, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, **more: Any) -> Any:
    call = {"batch_size": more.pop("batch_size", 64), "device": "cpu", "channel_first": True}
    measure = metric(normalise=False, disable_warnings=True, **more)
    return measure(model, images.numpy(), targets.numpy(), a_batch=maps.unsqueeze(1).numpy(), **call)


def ours(
    model: Classifier, images: Tensor, targets: Tensor, maps: Tensor, parts: Tensor, *wanted: Any
) -> Evaluation:
    return evaluate(model, images, targets, maps, parts, list(wanted))


def test_pixel_flipping_is_our_deletion_without_its_first_point(model: Classifier) -> None:
    images, targets, maps, parts = case(3)
    result = ours(model, images, targets, maps, parts, *chosen("deletion", "aopc", baseline="mean", steps=STEPS))
    (curve,) = result.curves.values()
    options = {"features_in_step": PER_STEP, "perturb_baseline": 0.0}
    flipped = torch.tensor(np.array(theirs(quantus.PixelFlipping, model.module, images, targets, maps, **options)))
    torch.testing.assert_close(flipped.double(), curve.prob[:, 1:], rtol=0, atol=1e-6)

    area = theirs(
        quantus.PixelFlipping, model.module, images, targets, maps, return_auc_per_sample=True, **options
    )
    deletion, aopc = result.values.values()
    # Steps count 1 each, not 1 / T, and the trapezoid between the clean image and step 1 is missing.
    first = 0.5 * (curve.prob[:, 0] + curve.prob[:, 1])
    torch.testing.assert_close(torch.tensor(area).double() + first, STEPS * deletion, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(curve.prob[:, 0] - flipped.double().mean(dim=1), aopc, rtol=0, atol=1e-6)


def test_pixel_flipping_flips_channels_apart(model: Classifier) -> None:
    """A step that is no multiple of three features leaves a pixel with some of its channels."""
    images, targets, maps, _ = case(1)
    seen: list[Tensor] = []
    handle = model.module.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    theirs(quantus.PixelFlipping, model.module, images, targets, maps, features_in_step=64, perturb_baseline=0.0)
    handle.remove()
    flipped = (seen[0][0] == 0).sum(dim=0)
    assert int(flipped.sum()) == 64
    assert set(flipped.unique().tolist()) - {0, 3}


def test_their_black_is_the_darkest_value_of_the_image(model: Classifier) -> None:
    """Of the normalised image, whatever its channel: black would be another number for each."""
    images, targets, maps, _ = case(2)
    seen: list[Tensor] = []
    handle = model.module.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    theirs(quantus.PixelFlipping, model.module, images, targets, maps, features_in_step=SIZE * SIZE)
    handle.remove()
    for b in range(2):
        assert torch.equal(seen[-1][b], torch.full_like(images[b], float(images[b].min())))
    black = model.normalise(torch.zeros(1, 3, 1, 1)).flatten()
    assert [round(float(one), 2) for one in black] == [-2.12, -2.04, -1.80]


def zero_inside(arr: np.ndarray, mask: np.ndarray, **_: Any) -> np.ndarray:
    """A replacement of parts by 0 that knows of three channels."""
    return np.where(mask, np.float32(0), arr)


@pytest.fixture
def given_parts(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Quantus cuts images itself; these parts it is made to take."""
    images, _, _, parts = case(2)
    known = {
        image.double().permute(1, 2, 0).numpy().tobytes(): labels
        for image, labels in zip(images, parts, strict=True)
    }
    monkeypatch.setattr(
        quantus.helpers.utils,
        "get_superpixel_segments",
        lambda img, segmentation_method: known[np.ascontiguousarray(img).tobytes()].numpy(),
    )
    return parts


def test_irof_has_no_first_step_and_grows_with_the_parts(model: Classifier, given_parts: Tensor) -> None:
    """Theirs is K - sum of trapezoids over steps 1..K, so removing nothing at all would score 1 and not 0."""
    images, targets, maps, _ = case(1)
    parts = given_parts[:1]
    (value,) = theirs(
        quantus.IROF, model.module, images, targets, maps, return_aggregate=False, perturb_func=zero_inside
    )
    result = ours(model, images, targets, maps, parts, *chosen("irof"))
    share = (result.curves["part_deletion[mean]"].prob / result.curves["part_deletion[mean]"].prob[:, :1])[0]
    count = len(share) - 1
    assert count == 4
    assert value == pytest.approx(count - float(torch.trapezoid(share[1:])), abs=1e-5)
    expected = 1 - (count - value + 0.5 * float(share[0] + share[1])) / count
    assert float(result.values["irof"][0]) == pytest.approx(expected, abs=1e-6)

    unchanged = torch.zeros_like(images)
    assert float(ours(model, unchanged, targets, maps, parts, *chosen("irof")).values["irof"]) == pytest.approx(0)


@pytest.mark.filterwarnings("ignore:The settings for perturbing input")
def test_irof_of_an_image_with_few_parts_depends_on_its_batch(model: Classifier, given_parts: Tensor) -> None:
    """Shorter curves are filled up with 0, and the trapezoid down to that 0 is counted."""
    images, targets, maps, _ = case(2)
    labels = given_parts.clone()
    # Their parts count from 0 without gaps and cover the image: the second image gets three.
    labels[1][labels[1] == 255] = 2
    given_parts.copy_(labels)
    options = {"return_aggregate": False, "perturb_func": zero_inside}
    together = theirs(quantus.IROF, model.module, images, targets, maps, **options)
    alone = theirs(quantus.IROF, model.module, images[1:], targets[1:], maps[1:], **options)
    result = ours(model, images, targets, maps, labels, *chosen("irof"))
    curve = result.curves["part_deletion[mean]"].prob[1]
    assert curve[-1].isnan() and not curve[-2].isnan()
    assert alone[0] - together[1] == pytest.approx(0.5 * float(curve[-2] / curve[0]), abs=1e-5)
    single = ours(model, images[1:], targets[1:], maps[1:], labels[1:], *chosen("irof"))
    torch.testing.assert_close(single.values["irof"][0], result.values["irof"][1])


def test_their_irof_and_road_refuse_colour(model: Classifier) -> None:
    """Masks of one channel meet images of three."""
    images, targets, maps, _ = case(1)
    with pytest.raises(AssertionError, match="shape of arr must be the same as the mask"):
        theirs(quantus.IROF, model.module, images, targets, maps)
    with pytest.raises(IndexError, match="out of bounds"):
        theirs(quantus.ROAD, model.module, images, targets, maps, percentages=[50])


class Grey(nn.Module):
    """A classifier of one channel, as their ROAD needs it."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.module = model.module
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.expand(-1, 3, -1, -1))


def test_imputations_agree() -> None:
    images, _, maps, _ = case(1)
    order = maps[0].flatten().argsort(descending=True).numpy()
    removed = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    removed.view(-1)[order[:300]] = True
    filled = noisy_linear_imputation(images[0].double().numpy(), order[:300].copy(), noise=0.0)
    torch.testing.assert_close(impute(images.double(), removed)[0], torch.from_numpy(filled), rtol=0, atol=1e-7)


def test_road_is_an_accuracy_of_the_first_batch(model: Classifier) -> None:
    """One number a percentage for all images, of which those behind the first batch are left out."""
    images, _, maps, parts = case(4)
    grey = images[:, :1]
    with torch.no_grad():
        targets = Grey(model)(grey).argmax(dim=1)
        targets[2:] = Grey(model)(grey[2:]).argmin(dim=1)
    options = {"percentages": [2], "noise": 0.0}
    accuracy = {
        size: theirs(quantus.ROAD, Grey(model), grey, targets, maps, batch_size=size, **options) for size in (4, 2)
    }
    assert accuracy == {4: {2: 0.5}, 2: {2: 1.0}}
    result = ours(
        model, grey.expand(-1, 3, -1, -1), targets, maps, parts, *chosen("road", percentages=(2,), order="most")
    )
    (values,) = result.values.values()
    assert values.shape == (4,) and len(set(values.tolist())) == 4


@pytest.mark.skipif(hasattr(np, "trapz"), reason="this NumPy still has trapz")
def test_areas_do_not_run_with_numpy_2_4(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "trapz")
    images, targets, maps, _ = case(1)
    with pytest.raises(AttributeError, match="trapz"):
        theirs(
            quantus.PixelFlipping,
            model.module,
            images,
            targets,
            maps,
            features_in_step=SIZE * SIZE,
            return_auc_per_sample=True,
        )
