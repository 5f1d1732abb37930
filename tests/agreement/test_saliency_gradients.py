"""Agreement of the gradient family with PAIR's ``saliency``, and where its rule of integration is another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from saliency.core.base import INPUT_OUTPUT_GRADIENTS
from saliency.core.gradients import GradientSaliency
from saliency.core.integrated_gradients import IntegratedGradients
from torch import Tensor

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.attribution.gradients.gradient import sample_noise
from xai_core.models import Classifier

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def caller(model: Classifier, target: int) -> Any:
    """The model as PAIR's functions call it: a batch of arrays in, their gradients out."""

    def call(values: np.ndarray, call_model_args: Any = None, expected_keys: Any = None) -> dict[str, np.ndarray]:
        leaf = torch.from_numpy(np.asarray(values)).double().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf)
        return {INPUT_OUTPUT_GRADIENTS: gradient.numpy()}

    return call


@pytest.mark.parametrize("family", MODELS)
def test_gradient(family: str) -> None:
    model = MODELS[family]()
    images, targets = pictures(2)
    ours = attribute(model, images, targets, method="gradient", options={"channels": "sum_abs"})
    for b in range(2):
        theirs = GradientSaliency().GetMask(images[b].numpy(), caller(model, int(targets[b])))
        torch.testing.assert_close(ours[b].double(), torch.from_numpy(theirs).abs().sum(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("square", [False, True])
def test_smooth_grad_with_the_same_noise(family: str, square: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are theirs: 25 samples, 15 % of the image's range. Their draws are replaced by ours."""
    model = MODELS[family]()
    images, targets = pictures(2)
    options = {"square": square, "channels": "sum"}
    ours = attribute(model, images, targets, method="smooth_grad", options=options)
    for b in range(2):
        draws = iter(sample_noise(0, slice(0, 25), 1, images))
        monkeypatch.setattr(
            np.random, "normal", lambda mean, deviation, shape, draws=draws: deviation * next(draws).numpy()
        )
        theirs = GradientSaliency().GetSmoothedMask(
            images[b].numpy(), caller(model, int(targets[b])), magnitude=square
        )
        monkeypatch.undo()
        expected = torch.from_numpy(theirs).sum(0)
        assert pearson(ours[b], expected) > 0.999999
        torch.testing.assert_close(ours[b].double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_smooth_grad_with_their_own_noise() -> None:
    """Other draws of the same distribution: maps meet as samples grow."""
    model = tiny_vit()
    images, targets = pictures(1)
    near = []
    for samples in (10, 400):
        options = {"samples": samples, "channels": "sum"}
        ours = attribute(model, images, targets, method="smooth_grad", options=options)
        np.random.seed(0)
        theirs = GradientSaliency().GetSmoothedMask(
            images[0].numpy(), caller(model, int(targets[0])), nsamples=samples, magnitude=False
        )
        near.append(pearson(ours[0], torch.from_numpy(theirs).sum(0)))
    assert near[1] > 0.999 and 1 - near[1] < 0.1 * (1 - near[0])


@pytest.mark.parametrize("family", MODELS)
def test_integrated_gradients_meet_with_many_steps(family: str) -> None:
    """PAIR weighs all steps alike, both ends among them: it nears the integral slowly, and is not complete."""
    model = MODELS[family]()
    images, targets = pictures(1)
    start = model.normalise(torch.zeros_like(images))
    ours = attribute(model, images, targets, method="integrated_gradients", options={"steps": 200})
    change = float((model(images) - model(start))[0, targets[0]])
    gaps = []
    for steps in (5, 1000):
        theirs = torch.from_numpy(
            IntegratedGradients().GetMask(
                images[0].numpy(),
                caller(model, int(targets[0])),
                x_baseline=start[0].numpy(),
                x_steps=steps,
                batch_size=50,
            )
        ).sum(0)
        gaps.append(abs(float(theirs.sum()) - change))
    assert pearson(ours[0], theirs) > 0.999
    assert gaps[1] < 0.05 * gaps[0]
    few = attribute(model, images, targets, method="integrated_gradients", options={"steps": 5})
    assert abs(float(few.sum()) - change) < gaps[0]
