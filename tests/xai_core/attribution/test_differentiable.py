"""Maps that can be differentiated by the images: against finite differences, and nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import relu6_mobilenet, relu_resnet
from tests.xai_core.attribution.untouched import state_of
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute
from xai_core.attribution.differentiable import (
    NoSecondDerivative,
    differentiable_maps,
    second_derivatives,
    softened,
)
from xai_core.attribution.explainer import Explainer
from xai_core.attribution.gradients.second_order import recomputed
from xai_core.attribution.interface import misfit
from xai_core.models import Classifier, ModelSpec
from xai_core.registry import methods


def relu_and_group_norm() -> Classifier:
    """A ReLU network whose normalisation is curved, which guided backpropagation fits all the same."""
    torch.manual_seed(0)
    arguments = {"num_classes": CLASSES, "channels": (8, 8, 16, 16), "stem_width": 8}
    module = timm.create_model("resnet10t", norm_layer="groupnorm1", **arguments).double()
    return Classifier(module, ModelSpec("resnet10t", False, transform={"input_size": (3, SIZE, SIZE)}))


NETWORKS: dict[str, Callable[[], Classifier]] = {
    "vit": tiny_vit,
    "silu": tiny_cnn,
    "relu": relu_resnet,
    "relu6": relu6_mobilenet,
    "group_norm": relu_and_group_norm,
}
# What these networks are there for; the others take every method.
ONLY = {
    "relu6": ("gradient", "guided_backprop", "lrp_epsilon", "lrp_z_plus", "srd"),
    "group_norm": ("guided_backprop", "guided_grad_cam"),
}
# What is off its default: budgets, an epsilon that is no cliff for a finite difference, and no clamp that leaves
# nothing of a map of one position.
OPTIONS = {
    "srd": {"start": "mean"},
    "integrated_gradients": {"steps": 3},
    "smooth_grad": {"samples": 2},
    "lrp_epsilon": {"epsilon": 0.3},
    "lrp_epsilon_plus": {"epsilon": 0.3},
}


def explainer(method: str) -> Explainer:
    return Explainer(method, methods.get(method).options(**OPTIONS.get(method, {})))


@cache
def network_of(name: str) -> Classifier:
    """One that the tests leave as it is."""
    return NETWORKS[name]()


@cache
def cases() -> list[tuple[str, str]]:
    return [
        (entry.name, name)
        for entry in methods
        if entry.differentiable
        for name in NETWORKS
        if entry.name in ONLY.get(name, (entry.name,))
        and misfit(entry, network_of(name), explainer(entry.name).options) is None
    ]


def test_who_can_be_differentiated() -> None:
    """Those that the published attacks on explanations follow, and more of their kind."""
    assert {entry.name for entry in methods if entry.differentiable} >= {
        *("gradient", "input_x_gradient", "integrated_gradients", "guided_backprop", "smooth_grad"),
        *("lrp_z_plus", "lrp_epsilon", "lrp_epsilon_plus", "grad_cam", "guided_grad_cam", "srd"),
    }
    assert {method for method, _ in cases()} == {entry.name for entry in methods if entry.differentiable}


@pytest.mark.parametrize(("method", "network"), cases())
def test_without_a_graph_they_are_the_methods_maps(method: str, network: str) -> None:
    model = network_of(network)
    images, targets = pictures(2)
    explain = explainer(method)
    with second_derivatives(model):
        found = differentiable_maps(explain, model, images.requires_grad_(True), targets)
    expected = explain.maps(model, images, targets)
    assert found.requires_grad or network in ("relu", "relu6")
    scale = expected.abs().max()
    torch.testing.assert_close(found.detach().float() / scale, expected / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "network"), cases())
def test_their_derivatives_are_those_of_finite_differences(method: str, network: str) -> None:
    model = network_of(network)
    images, targets = pictures(2)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(2, SIZE, SIZE, generator=generator, dtype=images.dtype)
    direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    step = 1e-7

    def weighted(some: Tensor) -> Tensor:
        return (differentiable_maps(explainer(method), model, some, targets) * weights).sum(dim=(1, 2))

    with second_derivatives(model, softplus_beta=10.0):
        leaves = images.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(weighted(leaves).sum(), leaves)
        ahead, behind = (
            weighted((images + sign * step * direction).requires_grad_(True)).detach() for sign in (1, -1)
        )
    expected = (ahead - behind) / (2 * step)
    assert (expected != 0).all()
    # A random direction sees about the norm of the slope.
    norm = slope.flatten(1).norm(dim=1)
    assert (((slope * direction).sum(dim=(1, 2, 3)) - expected).abs() < 1e-4 * norm).all()


def test_a_piecewise_linear_network_has_nothing_to_follow_until_it_is_softened() -> None:
    model = relu_resnet()
    images, targets = pictures(1)
    found = []
    for beta in (None, 10.0):
        with second_derivatives(model, beta):
            leaves = images.clone().requires_grad_(True)
            maps = differentiable_maps(explainer("gradient"), model, leaves, targets)
            (slope,) = torch.autograd.grad(maps.sum(), leaves)
        found.append(float(slope.abs().max()))
    assert found[0] == 0
    assert found[1] > 0


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        Tensor.relu,
        nn.ReLU(inplace=True),
        F.relu6,
        nn.ReLU6(inplace=True),
        nn.Hardtanh(-0.5, 2.0),
        lambda x: F.hardtanh(x, -1.0, 1.5),
        F.leaky_relu,
        nn.LeakyReLU(0.2),
    ],
)
def test_softened_rectifiers_are_smooth_and_near(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)
    sharp = function(x.clone())
    for beta in (5.0, 50.0):
        leaves = x.clone().requires_grad_(True)
        with softened(beta):
            soft = function(leaves.clone())
        # At each kink softplus is log(2) / beta above the ReLU, and nowhere more.
        gap = (soft.detach() - sharp).abs().max()
        assert 0.5 * math.log(2) / beta < float(gap) <= math.log(2) / beta + 1e-12
        (slope,) = torch.autograd.grad(soft.sum(), leaves)
        assert float(slope.diff().abs().max()) < 0.3 * beta * 0.04 + 1e-6
    torch.testing.assert_close(function(x.clone()), sharp)


def test_softplus_is_the_formula() -> None:
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    with softened(7.0):
        found = F.relu6(x)
    expected = (torch.log(1 + torch.exp(7 * x)) - torch.log(1 + torch.exp(7 * (x - 6)))) / 7
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["gradient", "guided_backprop", "lrp_z_plus"])
def test_the_network_is_left_as_it_was_even_by_an_error(method: str) -> None:
    model = relu_resnet()
    images, targets = pictures(1)
    before, logits = state_of(model.module), model(images)

    def interrupted() -> None:
        with second_derivatives(model, 10.0):
            differentiable_maps(explainer(method), model, images.clone().requires_grad_(True), targets)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert state_of(model.module) == before
    assert torch.equal(model(images), logits)
    assert torch.is_grad_enabled()


def test_attention_is_computed_step_by_step_inside_only() -> None:
    model = tiny_vit()
    flags = [block.attn.fused_attn for block in model.module.blocks]
    assert any(flags)
    with second_derivatives(model):
        assert not any(block.attn.fused_attn for block in model.module.blocks)
    assert [block.attn.fused_attn for block in model.module.blocks] == flags


def test_what_torch_cannot_differentiate_twice_is_told() -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    model.module.blocks[0].attn.forward = lambda x, **_: F.scaled_dot_product_attention(x, x, x)

    def twice() -> None:
        with second_derivatives(model):
            leaves = images.clone().requires_grad_(True)
            maps = differentiable_maps(explainer("gradient"), model, leaves, targets)
            torch.autograd.grad(maps.sum(), leaves)

    with pytest.raises(NoSecondDerivative, match="scaled_dot_product"):
        twice()


def test_recomputed_is_the_plain_call_twice() -> None:
    calls = []

    def function(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.requires_grad)
        return F.relu(a) * b.square()

    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    leaves = [one.clone().requires_grad_(True) for one in (a, b)]
    with softened(3.0):
        output = recomputed(function, *leaves)
        plain = [one.clone().requires_grad_(True) for one in (a, b)]
        expected = F.relu(plain[0]) * plain[1].square()
    # Outside of the block: what is computed again is softened all the same.
    found = torch.autograd.grad(output.sum(), leaves)
    torch.testing.assert_close(output, expected)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), plain), strict=True):
        torch.testing.assert_close(one, other)
    assert calls == [False, True]
    assert recomputed(function, a, b).grad_fn is None


def test_usual_maps_have_no_graph() -> None:
    model = tiny_cnn()
    images, targets = pictures(1)
    assert not attribute(model, images.requires_grad_(True), targets, method="gradient").requires_grad
