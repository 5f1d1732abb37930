"""LRP on convolutional networks against dense matrices of contributions, and what relevance must add up to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.propagation import lrp_rules
from xai_core.attribution.propagation.lrp import layers_with_rules
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, weights_digest
from xai_core.registry import build_options, methods

METHODS = ("lrp_epsilon", "lrp_z_plus", "lrp_epsilon_plus")
STABILISER = 1e-6

# A layer applied to a vector: its output, and the function from the output's relevance to the input's.
Back = Callable[[Tensor], Tensor]


def in_double(model: Classifier, images: Tensor, classes: Tensor, method: str, **options: object) -> Tensor:
    """A registered method without the interface's float32."""
    entry = methods.get(method)
    return entry.function(model, images, classes, build_options(entry, options), len(images))


# The slow twin: every linear layer as a dense matrix, every rule as the table of its contributions.


def matrix(operation: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of a linear operation on inputs of a shape, ``[outputs, inputs]``."""
    count = torch.Size(shape).numel()
    return operation(torch.eye(count, dtype=torch.float64).view(count, *shape)).flatten(1).T


def share(contributions: Tensor, offsets: Tensor, relevance: Tensor, stabiliser: float) -> Tensor:
    total = contributions.sum(1) + offsets
    total = total + stabiliser * torch.where(total < 0, -1.0, 1.0)
    return (contributions / total[:, None] * relevance[:, None]).sum(0)


def linear(dense: Tensor, bias: Tensor, x: Tensor, rule: str) -> tuple[Tensor, Back]:
    contributions = dense * x[None, :]
    if rule == "z_plus":
        return dense @ x + bias, lambda r: share(contributions.clamp(min=0), bias.clamp(min=0), r, STABILISER)
    return dense @ x + bias, lambda r: share(contributions, bias, r, STABILISER)


def convolution(layer: nn.Conv2d, norm: nn.BatchNorm2d | None, x: Tensor, rule: str) -> tuple[Tensor, Back]:
    weight, bias = layer.weight, torch.zeros(layer.out_channels, dtype=torch.float64)
    if norm is not None:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    dense = matrix(lambda basis: F.conv2d(basis, weight, None, layer.stride, layer.padding), tuple(x.shape))
    out = F.conv2d(x[None], weight, None, layer.stride, layer.padding)[0]
    y, back = linear(dense, bias[:, None, None].expand_as(out).flatten(), x.flatten(), rule)
    return y.view_as(out), lambda r: back(r.flatten()).view_as(x)


def average(pool: nn.Module, x: Tensor) -> tuple[Tensor, Back]:
    dense = matrix(pool, tuple(x.shape))
    contributions = dense * x.flatten()[None, :]
    no_offsets = torch.zeros(len(dense), dtype=torch.float64)
    y = pool(x[None])[0]
    return y, lambda r: share(contributions, no_offsets, r.flatten(), 1e-30).view_as(x)


def largest(pool: nn.MaxPool2d, x: Tensor) -> tuple[Tensor, Back]:
    """The winner of each window takes its relevance."""
    y, winners = F.max_pool2d(x[None], pool.kernel_size, pool.stride, pool.padding, return_indices=True)

    def back(relevance: Tensor) -> Tensor:
        result = torch.zeros_like(x).flatten(1)
        for channel in range(len(x)):
            for place, value in zip(winners[0, channel].flatten(), relevance[channel].flatten(), strict=True):
                result[channel, place] += value
        return result.view_as(x)

    return y[0], back


def residual_block(block: nn.Module, x: Tensor, rule: str) -> tuple[Tensor, Back]:
    hidden, back_1 = convolution(block.conv1, block.bn1, x, rule)
    branch, back_2 = convolution(block.conv2, block.bn2, hidden.relu(), rule)
    shortcut, backs = x, []
    for part in block.downsample or ():
        if isinstance(part, nn.AvgPool2d):
            shortcut, back = average(part, shortcut)
            backs.append(back)
        elif isinstance(part, nn.Conv2d):
            shortcut, back = convolution(part, block.downsample[-1], shortcut, rule)
            backs.append(back)
    total = branch + shortcut

    def back_sum(relevance: Tensor) -> Tensor:
        to_branch, to_shortcut = branch / total * relevance, shortcut / total * relevance
        for back in reversed(backs):
            to_shortcut = back(to_shortcut)
        return to_shortcut + back_1(back_2(to_branch))

    return total.relu(), back_sum


def relevance_by_hand(network: nn.Module, image: Tensor, target: int, composite: str) -> Tensor:
    rule = "epsilon" if composite == "epsilon" else "z_plus"
    backs, x = [], image
    stem = [*network.conv1, network.bn1]
    for layer, norm in zip(stem, [*stem[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d):
            x, back = convolution(layer, norm, x, rule)
            x = x.relu()
            backs.append(back)
    x, back = largest(network.maxpool, x)
    backs.append(back)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            x, back = residual_block(block, x, rule)
            backs.append(back)
    shape = x.shape
    x, back = average(nn.AvgPool2d(tuple(shape[-2:])), x)
    backs.append(lambda r, back=back, pooled=x.shape: back(r.view(pooled)))
    last = "z_plus" if composite == "z_plus" else "epsilon"
    logits, back = linear(network.fc.weight, network.fc.bias, x.flatten(), last)
    relevance = back(logits * F.one_hot(torch.tensor(target), len(logits)))
    for back in reversed(backs):
        relevance = back(relevance)
    return relevance.sum(0)


@pytest.mark.parametrize("method", METHODS)
def test_the_slow_twin(method: str) -> None:
    model = tiny_relu_cnn()
    images, targets = pictures(2)
    got = in_double(model, images, targets[:, None], method)[:, 0]
    for index in range(2):
        expected = relevance_by_hand(model.module, images[index], int(targets[index]), method.removeprefix("lrp_"))
        torch.testing.assert_close(got[index], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_the_rules_differ() -> None:
    model = tiny_relu_cnn()
    images, targets = pictures(1)
    maps = [in_double(model, images, targets[:, None], method) for method in METHODS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((maps[a] - maps[b]).norm() / maps[b].norm()) > 0.01


# What relevance adds up to.


def without_offsets(name: str) -> Classifier:
    """A network of random weights whose biases and running means are 0: nothing absorbs relevance."""
    torch.manual_seed(0)
    narrow = {"mlp_ratio": 1 / 128} if name.startswith("vgg") else {}
    module = timm.create_model(name, num_classes=5, **narrow).double()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.weight.normal_(std=(2 / part.weight[0].numel()) ** 0.5)
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.running_var.uniform_(0.5, 1.5)
            if hasattr(part, "gamma"):
                part.gamma.uniform_(0.5, 1.5)
    return Classifier(module, ModelSpec(name, False, transform={"input_size": (3, 64, 64)}))


NETWORKS = [
    "resnet18",
    "resnet50",
    "densenet121",
    "convnext_atto",
    "mobilenetv2_100",
    "efficientnet_b0",
    "regnety_002",
    "vgg11",
    "resnetv2_50",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_adds_up_to_the_logit_without_offsets(name: str) -> None:
    """Epsilon towards 0: exactly, whatever the network computes between its linear layers."""
    model = without_offsets(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classes = torch.tensor([[0, 1], [2, 3]])
    logits = model(images).gather(1, classes)
    got = in_double(model, images, classes, "lrp_epsilon", epsilon=1e-14).sum((2, 3))
    torch.testing.assert_close(got, logits, rtol=1e-6, atol=1e-6 * float(logits.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv2_100", "vgg11"])
@pytest.mark.parametrize("method", ["lrp_z_plus", "lrp_epsilon_plus"])
def test_z_plus_adds_up_without_offsets(name: str, method: str) -> None:
    """z+ loses what its stabiliser takes (1e-6 against denominators of the order of 1), and nothing else.

    A layer that gets no positive contribution at all could not hand its relevance on; ReLU networks have none.
    """
    model = without_offsets(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classes = torch.tensor([[0, 1], [2, 3]])
    logits = model(images).gather(1, classes)
    got = in_double(model, images, classes, method).sum((2, 3))
    torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


def test_biases_absorb_what_is_missing() -> None:
    """Gradient times bias, over all offsets of the folded layers, is exactly what the pixels do not get."""
    model = tiny_relu_cnn()
    images, targets = pictures(1)
    offsets = [
        part.bias.requires_grad_(True) for part in model.module.modules() if isinstance(part, nn.BatchNorm2d)
    ]
    means = [part for part in model.module.modules() if isinstance(part, nn.BatchNorm2d)]
    offsets.append(model.module.fc.bias.requires_grad_(True))
    logit = model(images)[0, targets[0]]
    gradients = torch.autograd.grad(logit, offsets)
    model.module.requires_grad_(False)
    absorbed = sum(float((g * b).sum()) for g, b in zip(gradients, offsets, strict=True))
    for gradient, part in zip(gradients[:-1], means, strict=True):
        scale = part.weight / (part.running_var + part.eps).sqrt()
        absorbed -= float((gradient * scale * part.running_mean).sum())
    pixels = float(in_double(model, images, targets[:, None], "lrp_epsilon", epsilon=1e-14).sum())
    assert abs(pixels + absorbed - float(logit.detach())) < 1e-8
    assert abs(absorbed) > 0.01


def test_smooth_activations_hand_all_their_relevance_on() -> None:
    """SiLU in place of ReLU: the relevance before and behind it is the same."""
    model = tiny_cnn()
    images, targets = pictures(1)
    kept: dict[str, Tensor] = {}
    norm, activation = model.module.bn1, model.module.act1
    with torch.enable_grad(), lrp_rules(model.module, "z_plus"):
        handles = [
            part.register_forward_hook(lambda _, __, output, name=name: kept.__setitem__(name, output))
            for name, part in (("before", norm), ("after", activation))
        ]
        score = model(images.requires_grad_(True))[0, targets[0]]
        for handle in handles:
            handle.remove()
    before, after = torch.autograd.grad(score, [kept["before"], kept["after"]])
    torch.testing.assert_close(before * kept["before"], after * kept["after"])
    assert float(after.abs().max()) > 0


# As a citizen of the house.


@pytest.mark.parametrize("method", METHODS)
def test_classes_share_one_graph(method: str) -> None:
    model = tiny_relu_cnn()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 3, 1], [4, 4, 0], [2, 1, 3]])
    together = attribute_classes(model, images, classes, method=method)
    for position in range(3):
        alone = attribute(model, images, classes[:, position], method=method, batch_size=1)
        torch.testing.assert_close(together[:, position], alone)


@pytest.mark.parametrize("method", METHODS)
def test_a_blank_image_has_a_finite_map(method: str) -> None:
    model = tiny_relu_cnn()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    assert attribute(model, images, torch.tensor([0, 1]), method=method).abs().max() == 0


def test_the_network_is_left_as_it_was_even_after_an_exception() -> None:
    model = tiny_relu_cnn()
    images, _ = pictures(1)
    before = weights_digest(model.module)

    def state() -> list[tuple[int, int, object, bool]]:
        return [
            (
                len(part._forward_hooks),
                len(part._forward_pre_hooks),
                getattr(part, "inplace", None),
                any(parameter.requires_grad for parameter in part.parameters()),
            )
            for part in model.module.modules()
        ]

    found = state()
    assert any(inplace for _, _, inplace, _ in found)

    def broken() -> None:
        with torch.enable_grad(), lrp_rules(model.module, "epsilon_plus"):
            model(images.requires_grad_(True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert state() == found
    attribute(model, images, torch.tensor([0]), method="lrp_epsilon_plus")
    assert state() == found
    assert weights_digest(model.module) == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin_tiny_patch4_window7_224", "a softmax"),
        ("nf_resnet26", "a convolution that changes its weights first"),
        ("poolformer_s12", "NativeGroupNorm"),
    ],
)
def test_what_has_no_rule_is_refused_by_what_it_computes(name: str, why: str) -> None:
    small = {"img_size": 64, "window_size": 4} if "swin" in name else {}
    model = Classifier(
        timm.create_model(name, num_classes=5, **small),
        ModelSpec(name, False, transform={} if small else {"input_size": (3, 64, 64)}),
    )
    assert why in str(layers_with_rules(model, None))


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["lrp_epsilon", "lrp_epsilon_plus"])
def test_epsilon_must_be_positive(method: str, epsilon: float) -> None:
    with pytest.raises(UsageError, match=rf"{method}\.epsilon: expected a positive"):
        attribute(tiny_relu_cnn(), *pictures(1), method=method, options={"epsilon": epsilon})
