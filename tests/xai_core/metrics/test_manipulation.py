"""The attack on explanations against a loop written from its formula, its limits, and what it cannot attack."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import relu_resnet
from tests.xai_core.attribution.untouched import state_of
from tests.xai_core.measuring import chosen
from tests.xai_core.metrics.explaining import Passes, explained, measured
from tests.xai_core.tiny import pictures, tiny_cnn
from xai_core.attribution.explainer import Explainer
from xai_core.errors import UsageError
from xai_core.metrics import evaluate
from xai_core.metrics.robustness.attack import Attack, AttackOptions, allowed, partners, shares
from xai_core.metrics.robustness.manipulation import manipulated
from xai_core.models import Classifier
from xai_core.registry import metrics, variant_id

NAMES = ("manipulation_ssim", "manipulation_pcc")
STEPS = 12


def valid_pictures(count: int, model: Classifier) -> tuple[Tensor, Tensor]:
    """Pictures whose channels lie in [0, 1]."""
    images, targets = pictures(count)
    return model.normalise((0.5 + 0.2 * images).clamp(0, 1)), targets


def softplus_twin(model: Classifier, beta: float) -> nn.Module:
    """The network with softplus modules for its ReLUs."""
    twin = copy.deepcopy(model.module)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta))
    return twin


def slow_attack(
    model: Classifier, soft: nn.Module, image: Tensor, target: int, goal: Tensor, options: AttackOptions
) -> Tensor:
    """Equation 7 for one image and the gradient's magnitude, by torch's Adam."""
    mean, std = (
        torch.tensor(model.data_config[name], dtype=image.dtype).view(3, 1, 1) for name in ("mean", "std")
    )
    reach = options.bound / 255 / std
    lowest, highest = (image - reach).clamp(min=-mean / std), (image + reach).clamp(max=(1 - mean) / std)
    goal = goal.double().abs() / goal.double().abs().sum()
    logits = model.module(image[None])[0].detach()
    moved = image.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moved], lr=options.learning_rate)
    for _ in range(options.max_steps):
        before = moved.detach().clone()
        (gradient,) = torch.autograd.grad(soft(moved[None])[0, target], moved, create_graph=True)
        map_ = gradient.abs().max(dim=0).values
        loss = options.explanation_weight * (map_ / map_.sum() - goal).norm() ** 2
        loss = loss + options.logit_weight * (model.module(moved[None])[0] - logits).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved.data = torch.minimum(torch.maximum(moved.data, lowest), highest)
        if float((moved.data - image).square().mean()) > options.mse:
            return before
    return moved.detach()


@pytest.mark.parametrize("mse", [1.0, 4e-5], ids=["all steps", "ends early"])
@pytest.mark.parametrize("network", [tiny_cnn, relu_resnet])
def test_the_slow_twin(network, mse: float) -> None:  # type: ignore[no-untyped-def]
    model = network()
    images, targets = valid_pictures(2, model)
    explainer = Explainer("gradient")
    goals = explainer.maps(model, images, targets).flip(0)
    options = AttackOptions(max_steps=STEPS, mse=mse, bound=2.0)
    found = Attack(model, explainer, options).run(images, targets, goals)
    soft = softplus_twin(model, options.softplus_beta or 0.0)
    for b in range(2):
        expected = slow_attack(model, soft, images[b], int(targets[b]), goals[b], options)
        torch.testing.assert_close(found.images[b], expected, rtol=0, atol=1e-9)
        assert float((expected - images[b]).abs().max()) > 1e-3
    assert (found.steps == STEPS).all() if mse == 1.0 else (found.steps < STEPS).all()


@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("gradient", {}, 0.8),
        ("integrated_gradients", {"steps": 4}, 0.9),
        ("grad_cam", {"layer": "layer2"}, 0.4),
        ("lrp_z_plus", {}, 0.9),
    ],
)
def test_it_brings_the_map_nearer_to_the_goal_and_holds_the_logits(
    method: str, options: dict[str, Any], factor: float
) -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(2, model)
    evidence = explained(model, images, targets, method, **options)
    assert evidence.explainer is not None
    goals = evidence.maps.flip(0)
    found = Attack(model, evidence.explainer, AttackOptions(learning_rate=3e-3)).run(images, targets, goals)
    assert (found.steps < 30).all()
    maps = evidence.explainer.maps(model, found.images, targets)
    before, after = ((shares(one) - shares(goals)).square().sum(dim=(1, 2)) for one in (evidence.maps, maps))
    assert (after < factor * before).all(), after / before
    with torch.no_grad():
        logits = model(images)
        change = (model(found.images) - logits).abs().amax(dim=1)
    assert (change < 0.02 * (logits.amax(dim=1) - logits.amin(dim=1))).all(), change


def test_every_limit_is_kept() -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(3, model)
    explainer = Explainer("gradient")
    goals = explainer.maps(model, images, targets).roll(-1, 0)
    for bound, mse in ((1.0, 1.0), (8.0, 1e-4)):
        options = AttackOptions(max_steps=60, bound=bound, mse=mse)
        moved = Attack(model, explainer, options).run(images, targets, goals).images
        change = model.denormalise(moved) - model.denormalise(images)
        assert float(change.abs().max()) <= bound / 255 + 1e-12
        within = (moved - images).square().flatten(1).mean(dim=1)
        assert (within <= mse).all()
        # One of the two has ended it.
        assert float(change.abs().max()) > 0.99 / 255 if mse == 1.0 else (within > 0.7 * mse).all()
        torch.testing.assert_close(model.normalise(model.denormalise(moved)), moved)


def test_what_is_no_picture_may_stay() -> None:
    model = tiny_cnn()
    images, _ = pictures(1)
    images = 3 * images
    lowest, highest = allowed(model, images, 8.0)
    assert (lowest <= images).all()
    assert (images <= highest).all()
    outside = images > model.normalise(torch.ones_like(images))
    assert outside.any()
    assert torch.equal(highest[outside], images[outside])


def test_values_are_those_of_scikit_image_and_scipy() -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(2, model)
    evidence = explained(model, images, targets, "input_x_gradient")
    after = manipulated(evidence, AttackOptions(max_steps=STEPS)).maps
    ssim, _ = measured(evidence, "manipulation_ssim", max_steps=STEPS)
    pcc, _ = measured(evidence, "manipulation_pcc", max_steps=STEPS)
    for b in range(2):
        one, other = (maps[b].double().abs().numpy() for maps in (evidence.maps, after))
        scaled = [(each - each.min()) / (each.max() - each.min()) for each in (one, other)]
        assert float(ssim[b]) == pytest.approx(structural_similarity(*scaled, data_range=1.0), abs=1e-9)
        assert float(pcc[b]) == pytest.approx(pearsonr(one.flatten(), other.flatten()).statistic, abs=1e-9)
        assert float(pcc[b]) < 0.999


def test_both_metrics_share_one_attack() -> None:
    model = tiny_cnn()
    images, targets = valid_pictures(2, model)
    evidence = explained(model, images, targets, "gradient")
    passes = Passes(model)
    measured(evidence, "manipulation_ssim", max_steps=3)
    first = sum(passes.sizes)
    # The logits once; a step explains and reads the logits; then the maps, and the predictions before and after.
    assert first == 2 * (1 + 3 * 2 + 1 + 2)
    measured(evidence, "manipulation_pcc", max_steps=3)
    assert sum(passes.sizes) == first


@pytest.mark.parametrize(("method", "options"), [("gradient", {}), ("smooth_grad", {"samples": 2})])
def test_neighbours_and_batch_sizes_change_nothing(method: str, options: dict[str, Any]) -> None:
    model = tiny_cnn()
    images, _ = valid_pictures(4, model)
    targets = torch.tensor([0, 1, 1, 0])
    together = explained(model, images, targets, method, **options)
    small = explained(model, images, targets, method, batch_size=4, **options)
    pairs = [
        explained(model, images[pair], targets[pair], method, **options)
        for pair in ([0, 1], [1, 3], [2, 3], [3, 1])
    ]
    for name in NAMES:
        values, reasons = measured(together, name, max_steps=6)
        assert set(reasons) == {None}
        torch.testing.assert_close(measured(small, name, max_steps=6)[0], values, rtol=0, atol=1e-6)
        alone = torch.stack([measured(pair, name, max_steps=6)[0][0] for pair in pairs])
        torch.testing.assert_close(alone, values, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7))
def test_partners_are_the_next_of_another_class(drawn: list[tuple[int, bool]]) -> None:
    classes, usable = zip(*drawn, strict=True)
    expected = []
    for place in range(len(drawn)):
        others = [(place + ahead) % len(drawn) for ahead in range(1, len(drawn))]
        fitting = [other for other in others if classes[other] != classes[place] and usable[other]]
        expected.append(fitting[0] if fitting else -1)
    assert partners(torch.tensor(classes), torch.tensor(usable)).tolist() == expected


def test_the_model_is_left_as_it_was_even_by_an_error() -> None:
    model = relu_resnet()
    images, targets = valid_pictures(2, model)
    evidence = explained(model, images, targets, "gradient")
    before = state_of(model.module)
    measured(evidence, "manipulation_ssim", max_steps=2)
    assert state_of(model.module) == before
    passed = []

    def fail(*_: object) -> None:
        passed.append(1)
        if len(passed) == 4:
            raise RuntimeError("the power is gone")

    handle = model.module.fc.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the power is gone"):
        evaluate(evidence, chosen("manipulation_ssim", max_steps=3))
    handle.remove()
    assert state_of(model.module) == before
    assert torch.equal(model(images), model(images.clone()))


def test_the_options_and_the_ids() -> None:
    entry = metrics.get("manipulation_ssim")
    assert variant_id(entry.name, AttackOptions(max_steps=50)) == "manipulation_ssim[max_steps=50]"
    assert (AttackOptions().explanation_weight, AttackOptions().logit_weight) == (1e11, 1e6)
    for name in ("explanation_weight", "learning_rate", "mse", "bound", "max_steps", "softplus_beta"):
        with pytest.raises(UsageError, match=rf"^{name}: expected"):
            dataclasses.replace(AttackOptions(), **{name: 0})
    with pytest.raises(UsageError, match=r"^logit_weight: expected"):
        AttackOptions(logit_weight=-1.0)
    with pytest.raises(UsageError, match=r"^mse: expected"):
        AttackOptions(mse=np.nan)
