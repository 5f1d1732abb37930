"""Agreement of ROAD with pytorch-grad-cam, whose percentiles name what is kept, and where it parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_grad_cam.metrics import road as peer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import pictures, tiny_cnn
from xai_core.metrics.perturbation.linear_imputation import impute
from xai_core.models import Classifier

# 40 x 40 pixels, so that these are whole numbers of pixels and both sides remove as many.
SIZE, PERCENTAGES = 40, (10, 30, 50, 90)


@pytest.fixture(scope="module")
def model() -> Classifier:
    model = tiny_cnn()
    model.module.float()
    return model


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


def case(count: int) -> tuple[Tensor, Tensor, Tensor]:
    images, targets = pictures(count)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return images, targets, torch.rand(count, SIZE, SIZE, generator=generator)


def theirs(metric: Any, model: Classifier, images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    classes = [ClassifierOutputSoftmaxTarget(int(target)) for target in targets]
    return torch.from_numpy(np.asarray(metric(images, maps.numpy(), classes, model.module))).double()


def ours(model: Classifier, images: Tensor, targets: Tensor, maps: Tensor, **options: Any) -> Tensor:
    wanted = chosen("road", **{"percentages": PERCENTAGES, "noise": 0.0, **options})
    (values,) = evaluate(model, images, targets, maps, None, wanted).values.values()
    return values


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputations_agree(share: float) -> None:
    """Theirs comes from a sparse direct solver in double precision and is rounded to single."""
    images, _, _ = case(1)
    removed = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < share
    removed[0, 5:30, 8:20] = True
    filled = peer.NoisyLinearImputer(noise=0.0)(images[0], (~removed[0]).float())
    torch.testing.assert_close(impute(images, removed)[0], filled, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("noiseless")
def test_each_order_agrees_and_higher_is_always_better_here(model: Classifier) -> None:
    """Their percentile keeps what we remove, and both of their orders give the change after removal."""
    images, targets, maps = case(3)
    kept = [100 - one for one in PERCENTAGES]
    most = theirs(peer.ROADMostRelevantFirstAverage(kept), model, images, targets, maps)
    least = theirs(peer.ROADLeastRelevantFirstAverage(kept), model, images, targets, maps)
    torch.testing.assert_close(ours(model, images, targets, maps, order="most"), -most, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours(model, images, targets, maps, order="least"), least, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("noiseless")
def test_combined_agrees(model: Classifier) -> None:
    images, targets, maps = case(3)
    both = theirs(peer.ROADCombined([100 - one for one in PERCENTAGES]), model, images, targets, maps)
    torch.testing.assert_close(ours(model, images, targets, maps), both, rtol=0, atol=2e-6)


def removed_by(peers: Any, image: Tensor, map_: Tensor) -> int:
    """How many pixels a peer's metric replaces."""
    kept: list[Tensor] = []
    peers.perturbation.imputer = lambda tensor, mask: (kept.append(mask), tensor)[1]
    peers.perturbation(image, map_)
    return int((kept[0] == 0).sum())


def test_ties_remove_no_more_than_their_share(model: Classifier) -> None:
    """A map that is 0 on 60 % of its pixels: at the median pytorch-grad-cam removes all, and no image is left."""
    images, targets, maps = case(1)
    sparse = (maps - maps.flatten().quantile(0.6)).relu()
    assert removed_by(peer.ROADMostRelevantFirst(50), images[0], sparse[0]) == SIZE * SIZE
    nothing_left = peer.RemoveMostRelevantFirst(50, peer.NoisyLinearImputer(noise=0.0))
    assert torch.equal(nothing_left(images[0], sparse[0]), nothing_left(-images[0], sparse[0]))
    wanted = chosen("road", order="most", percentages=(50,))
    (curve,) = evaluate(model, images, targets, sparse, None, wanted).curves.values()
    assert curve.fraction[0].tolist() == [0.0, 0.5]
    assert curve.prob.isfinite().all()


def test_a_small_scale_is_no_tie(model: Classifier) -> None:
    """Least relevant first they rank 1 - map: in single precision a map of gradients near 1e-9 is all 1."""
    images, targets, maps = case(1)
    assert removed_by(peer.ROADLeastRelevantFirst(50), images[0], maps[0]) == SIZE * SIZE // 2
    assert removed_by(peer.ROADLeastRelevantFirst(50), images[0], 1e-9 * maps[0]) == SIZE * SIZE
    torch.testing.assert_close(
        ours(model, images, targets, 1e-9 * maps), ours(model, images, targets, maps), rtol=0, atol=0
    )


def test_noise_is_that_of_pictures() -> None:
    """Theirs is added to normalised images: in pictures it is as much smaller as their standard deviation is."""
    model = tiny_cnn()
    images, targets = pictures(1)
    removed = torch.ones(64, 64)
    removed[0, 0] = 0
    torch.manual_seed(0)
    flat = torch.zeros(3, 64, 64)
    filled = peer.NoisyLinearImputer()(flat, 1 - removed)
    std = torch.tensor(model.data_config["std"])
    assert float(filled.std()) == pytest.approx(0.01, rel=0.05)
    assert [round(float(one), 5) for one in 0.01 * std] == [0.00229, 0.00224, 0.00225]
    seen: list[Tensor] = []
    model.module.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    options = {"percentages": (90,), "order": "most"}
    for noise in (0.01, 0.0):
        evaluate(model, images, targets, images[:, 0], None, chosen("road", noise=noise, **options))
    added = (seen[1] - seen[3])[0]
    gone = added.abs().sum(dim=0) > 0
    assert int(gone.sum()) == int(0.9 * 32 * 32)
    torch.testing.assert_close(
        added[:, gone].std(dim=1) * std.double(), torch.full((3,), 0.01).double(), rtol=0.1, atol=0
    )
