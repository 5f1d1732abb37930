"""Integrated gradients against the formula, their axiom, and how many pictures a pass holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.xai_core.tiny import CLASSES, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.gradients.integrated_gradients import path_rule
from xai_core.baselines import gaussian_blur

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_every_class_from_the_formula(family: str, baseline: str) -> None:
    model = MODELS[family]()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    options = {"steps": 4, "baseline": baseline}
    maps = attribute_classes(model, images, classes, method="integrated_gradients", options=options, batch_size=3)
    starts = {
        "black": model.normalise(torch.zeros_like(images)),
        "mean": torch.zeros_like(images),
        "blur": gaussian_blur(images, 11.0),
    }[baseline]
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for b in range(2):
        for k in range(2):
            expected = torch.zeros(images.shape[-2:], dtype=torch.float64)
            for node, weight in zip(nodes, weights, strict=True):
                point = starts[b] + (0.5 + node / 2) * (images[b] - starts[b])
                leaf = point.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(model(leaf.unsqueeze(0))[0, classes[b, k]], leaf)
                for c in range(3):
                    expected += weight / 2 * (images[b, c] - starts[b, c]) * gradient[c]
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_maps_add_to_the_change_of_the_logit(family: str, baseline: str) -> None:
    """Completeness (proposition 1 of the paper), within the rule's error on a smooth network."""
    model = MODELS[family]()
    images, targets = pictures(2)
    start = {
        "black": model.normalise(torch.zeros_like(images)),
        "mean": torch.zeros_like(images),
        "blur": gaussian_blur(images, 11.0),
    }[baseline]
    options = {"steps": 300, "baseline": baseline}
    maps = attribute(model, images, targets, method="integrated_gradients", options=options)
    change = (model(images) - model(start)).gather(1, targets.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(maps.double().flatten(1).sum(1), change, rtol=1e-3, atol=1e-4)


def test_the_rule_is_exact_for_polynomials() -> None:
    places, weights = path_rule(5)
    assert places.min() > 0 and places.max() < 1
    for power in range(10):
        assert (weights * places**power).sum() == pytest.approx(1 / (power + 1), abs=1e-14)


def test_a_pass_holds_no_more_than_the_batch_whatever_the_steps_and_classes() -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    sizes: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    classes = torch.arange(CLASSES).expand(2, -1)
    attribute_classes(model, images, classes, method="integrated_gradients", options={"steps": 7}, batch_size=4)
    handle.remove()
    # 2 images times 7 steps, once for all five classes.
    assert sizes == [4, 4, 4, 2]
