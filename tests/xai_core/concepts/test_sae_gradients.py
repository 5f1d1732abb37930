"""Losses and gradients of all variants against the papers' formulas in float64, by autograd and loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts.sae import VARIANTS
from xai_core.concepts.sae.gradients import backpropagate, revive
from xai_core.concepts.sae.learner import Learner
from xai_core.concepts.sae.model import Autoencoder
from xai_core.concepts.sae.resampling import resample
from xai_core.concepts.sae.variants import next_largest

BATCH, CHANNELS, ATOMS, ACTIVE = 11, 6, 20, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "sae": {"l1": 0.2},
    "sae_top_k": {"k": ACTIVE},
    "sae_batch_top_k": {"k": ACTIVE},
    "sae_matryoshka": {"k": ACTIVE, "prefixes": (0.1, 0.45, 1.0)},
}


def model() -> Autoencoder:
    unit = torch.nn.functional.normalize(normal(ATOMS, CHANNELS, seed=3), dim=1)
    return Autoencoder(normal(ATOMS, CHANNELS, seed=1), normal(ATOMS, seed=2), unit, normal(CHANNELS, seed=4))


def slow_codes(extractor: str, activations: Tensor) -> Tensor:
    """Which latents fire, by sorting."""
    positive = activations.clamp(min=0)
    if extractor == "sae_top_k":
        kept = torch.zeros_like(positive)
        for row, places in enumerate(positive.topk(ACTIVE, dim=1).indices):
            kept[row, places] = 1
        return positive * kept
    if extractor in ("sae_batch_top_k", "sae_matryoshka"):
        kept = torch.zeros(positive.numel(), dtype=positive.dtype)
        kept[positive.flatten().topk(ACTIVE * len(positive)).indices] = 1
        return positive * kept.view_as(positive)
    return positive


def slow_loss(extractor: str, model: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss by the formula, one vector and one prefix after the other, and the codes."""
    codes = slow_codes(extractor, (x - model.b_d) @ model.W_e.T + model.b_e)
    total = x.new_zeros(())
    for vector, u in zip(x, codes, strict=True):
        for first in {"sae_matryoshka": (2, 9, 20)}.get(extractor, (ATOMS,)):
            rebuilt = sum((u[k] * model.W_d[k] for k in range(first)), model.b_d)
            total = total + (vector - rebuilt).square().sum() / 2
        if extractor == "sae":
            total = total + 0.2 * CHANNELS**0.5 * u.abs().sum()
    return total / len(x), codes


def doubled(model: Autoencoder) -> Autoencoder:
    return Autoencoder(
        **{name: value.detach().double().requires_grad_() for name, value in model.parameters.items()}
    )


@pytest.mark.parametrize("extractor", VARIANTS)
def test_loss_codes_and_gradients_equal_autograd_of_the_formula(extractor: str) -> None:
    x = 3 * normal(BATCH, CHANNELS)
    variant = VARIANTS[extractor]
    learner = Learner(variant, variant.options(batch_size=BATCH, **OPTIONS[extractor]), model(), 0)
    precise = doubled(learner.model)
    loss, codes = slow_loss(extractor, precise, x.double())
    loss.backward()
    workspace = torch.full((2, BATCH, ATOMS), float("nan"))
    passed = backpropagate(learner.model, x, learner._objective, *workspace)
    torch.testing.assert_close(passed.loss.double(), loss.detach())
    torch.testing.assert_close(workspace[0].double(), codes.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(passed.sums.double(), codes.detach().sum(dim=0), rtol=1e-4, atol=1e-5)
    for name, parameter in precise.parameters.items():
        found = learner.model.parameters[name].grad
        assert found is not None
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_equals_a_loop_over_vectors_and_dead_latents() -> None:
    x, error = 3 * normal(BATCH, CHANNELS), normal(BATCH, CHANNELS, seed=9)
    dead, most, weight = torch.tensor([1, 4, 7, 8, 13]), 2, 0.3
    fast = model()
    for parameter in fast.parameters.values():
        parameter.requires_grad_()
    precise = doubled(fast)
    before = fast.gradients.W_e.fill_(1.0)
    loss = torch.zeros((), dtype=torch.float64)
    for vector, missed in zip(x.double(), error.double(), strict=True):
        activations = {int(k): (vector - precise.b_d) @ precise.W_e[k] + precise.b_e[k] for k in dead}
        strongest = sorted(activations, key=lambda k: -activations[k].item())[:most]
        rebuilt = sum((activations[k].clamp(min=0) * precise.W_d[k] for k in strongest), torch.zeros(CHANNELS))
        loss = loss + weight / 2 * (-missed - rebuilt).square().sum() / BATCH
    loss.backward()
    found = revive(fast, x, error, dead, most, weight)
    torch.testing.assert_close(found.double(), loss.detach())
    # They are added to those of the loss.
    before -= 1
    for name, parameter in precise.parameters.items():
        gradient = fast.parameters[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-4, atol=1e-5)
    assert not fast.gradients.W_d[0].any()


@pytest.mark.parametrize("k", [1, 3, 19, 20])
def test_the_next_largest_number_lets_k_pass(k: int) -> None:
    values = normal(7, 20).abs()
    floor = next_largest(values, k)
    assert ((values > floor).sum(dim=1) == k).all()
    assert torch.equal(floor, values.sort(dim=1, descending=True).values[:, k : k + 1] if k < 20 else 0 * floor)
    assert not next_largest(-values, k).any()


def test_atoms_stay_unit_vectors_and_gradients_turn_them() -> None:
    one = model()
    for parameter in one.parameters.values():
        parameter.requires_grad_()
    one.gradients.W_d.copy_(normal(ATOMS, CHANNELS, seed=5))
    one.project_gradient()
    assert (one.gradients.W_d * one.W_d).sum(dim=1).abs().max() < 1e-5
    assert one.gradients.W_d.norm(dim=1).min() > 0.1
    with torch.no_grad():
        one.W_d.mul_(torch.arange(1.0, ATOMS + 1).unsqueeze(1))
    one.normalise()
    torch.testing.assert_close(one.W_d.detach(), model().W_d)


def test_resampled_latents_point_at_vectors_that_are_rebuilt_badly() -> None:
    one = model()
    for parameter in one.parameters.values():
        parameter.requires_grad_()
    optimiser = torch.optim.Adam(one.parameters.values())
    one.gradients.W_e.fill_(1.0)
    optimiser.step()
    x = 3 * normal(BATCH, CHANNELS)
    error = torch.zeros(BATCH, CHANNELS)
    error[[2, 5]] = 1.0
    before = {name: value.detach().clone() for name, value in one.parameters.items()}
    begun = resample(one, optimiser, torch.tensor([3, 11]), x, error, torch.Generator().manual_seed(0))
    assert begun.tolist() == [3, 11]
    directions = torch.nn.functional.normalize(x[[2, 5]] - before["b_d"], dim=1)
    assert torch.allclose(one.W_d[[3, 11]], directions) or torch.allclose(one.W_d[[11, 3]], directions)
    living = torch.tensor([latent for latent in range(ATOMS) if latent not in (3, 11)])
    length = 0.2 * before["W_e"][living].norm(dim=1).mean()
    torch.testing.assert_close(one.W_e[[3, 11]], one.W_d[[3, 11]] * length)
    assert not one.b_e[[3, 11]].any()
    assert not optimiser.state[one.W_e]["exp_avg"][[3, 11]].any()
    assert optimiser.state[one.W_e]["exp_avg"][living].all()
    for name in ("W_e", "W_d", "b_e"):
        assert torch.equal(one.parameters[name][living], before[name][living])


def test_no_more_latents_begin_anew_than_the_batch_has_vectors_and_none_where_none_lives() -> None:
    one = model()
    optimiser = torch.optim.Adam([parameter.requires_grad_() for parameter in one.parameters.values()])
    for parameter in one.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    x, generator = normal(4, CHANNELS), torch.Generator().manual_seed(0)
    assert len(resample(one, optimiser, torch.arange(9), x, x, generator)) == 4
    assert len(resample(one, optimiser, torch.arange(ATOMS), normal(50, CHANNELS), x, generator)) == 0
