"""DeepLIFT's Rescale rule: multiplied out with full matrices, its axiom, and what is refused."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.xai_core.attribution.relu_networks import NETWORKS
from tests.xai_core.attribution.test_guided_backprop import functional, gated
from tests.xai_core.tiny import CLASSES, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec

SMALL = 8


class Chain(nn.Module):
    """Convolution, SiLU in place, overlapping max pooling, convolution, ReLU6, linear: one after the other."""

    num_classes = CLASSES
    pretrained_cfg: ClassVar[dict] = {}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.smooth = nn.SiLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3)
        self.bent = nn.ReLU6(inplace=True)
        self.head = nn.Linear(16, CLASSES)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.bent(self.second(self.pool(self.smooth(self.first(images)))))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).flatten(1))


def chain() -> Classifier:
    torch.manual_seed(0)
    module = Chain().double()
    with torch.no_grad():
        module.second.weight.mul_(50)  # some activations beyond 6
    return Classifier(module, ModelSpec("chain", False, transform={"input_size": (3, SMALL, SMALL)}))


def quotients(function, values: Tensor, before: Tensor) -> Tensor:
    """The Rescale rule, element by element, as a diagonal matrix."""
    multipliers = []
    for new, old in zip(values.flatten().tolist(), before.flatten().tolist(), strict=True):
        after, was = (float(function(torch.tensor(one, dtype=torch.float64))) for one in (new, old))
        multipliers.append((after - was) / (new - old) if abs(new - old) > 1e-12 else 0.0)
    return torch.diag(torch.tensor(multipliers, dtype=torch.float64))


def pooling_matrix(values: Tensor, before: Tensor) -> Tensor:
    """A window's rise is given to the image's largest element, its fall to the reference's."""
    _, channels, height, width = values.shape
    flat, was = values.flatten(), before.flatten()
    rows = []
    for c in range(channels):
        for y in range(0, height, 2):
            for x in range(0, width, 2):
                window = [
                    (c * height + i) * width + j
                    for i in range(max(0, y - 1), min(height, y + 2))
                    for j in range(max(0, x - 1), min(width, x + 2))
                ]
                winner = max(window, key=lambda place: float(flat[place]))
                lost = max(window, key=lambda place: float(was[place]))
                change = flat[winner] - was[lost]
                place = winner if change > 0 else lost
                row = torch.zeros(flat.numel(), dtype=torch.float64)
                row[place] = change / (flat[place] - was[place])
                rows.append(row)
    return torch.stack(rows)


def matrix(linear, inputs: Tensor) -> Tensor:
    """The matrix of an affine map of one example."""
    jacobian = torch.autograd.functional.jacobian(linear, inputs)
    return jacobian.reshape(-1, inputs.numel())


@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_every_class_by_products_of_matrices(baseline: str) -> None:
    model = chain()
    net = model.module
    images = pictures(2)[0][:, :, :SMALL, :SMALL]
    classes = torch.tensor([[0, 3], [4, 1]])
    maps = attribute_classes(model, images, classes, method="deep_lift", options={"baseline": baseline})
    reference = torch.zeros(1, 3, SMALL, SMALL, dtype=torch.float64)
    reference = model.normalise(reference) if baseline == "black" else reference
    for b in range(2):
        image = images[b : b + 1]
        inner, was = net.first(image), net.first(reference)
        pooled_in, pooled_was = F.silu(inner), F.silu(was)
        last, last_was = (net.second(F.max_pool2d(one, 3, 2, 1)) for one in (pooled_in, pooled_was))
        assert float(last.max()) > 6  # the bound of ReLU6 is reached
        product = matrix(net.head, F.relu6(last).flatten(1))
        product = product @ quotients(F.relu6, last, last_was)
        product = product @ matrix(net.second, F.max_pool2d(pooled_in, 3, 2, 1))
        product = product @ pooling_matrix(pooled_in, pooled_was)
        product = product @ quotients(F.silu, inner, was) @ matrix(net.first, image)
        for k in range(2):
            multipliers = product[classes[b, k]].view(3, SMALL, SMALL)
            expected = (multipliers * (image - reference)[0]).sum(dim=0)
            torch.testing.assert_close(maps[b, k].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("network", [*NETWORKS, "silu", "chain"])
@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_maps_add_to_the_change_of_the_logit(network: str, baseline: str) -> None:
    """Summation to delta (eq. 1), for every class, within float32's rounding of the map."""
    model = {"silu": tiny_cnn, "chain": chain, **NETWORKS}[network]()
    size = model.input_size[0]
    images = pictures(3)[0][:, :, :size, :size]
    classes = torch.arange(CLASSES).expand(3, -1)
    maps = attribute_classes(model, images, classes, method="deep_lift", options={"baseline": baseline})
    reference = torch.zeros_like(images)
    reference = model.normalise(reference) if baseline == "black" else reference
    change = model(images) - model(reference)
    torch.testing.assert_close(maps.double().sum(dim=(2, 3)), change, rtol=1e-5, atol=1e-5)


def test_an_image_that_is_the_reference_has_a_map_of_zeros() -> None:
    for build in (*NETWORKS.values(), tiny_cnn):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
        maps = attribute(build(), images, torch.tensor([0, 1]), method="deep_lift", options={"baseline": "mean"})
        assert torch.equal(maps, torch.zeros_like(maps))


def test_float32_keeps_to_float64_where_image_and_reference_nearly_meet() -> None:
    """Quotients of differences that are rounding are replaced by derivatives."""
    model = tiny_cnn()
    images = 1e-5 * pictures(2)[0]
    options = {"baseline": "mean"}
    targets = torch.tensor([0, 1])
    exact = attribute(model, images, targets, method="deep_lift", options=options)
    model.module.float()
    rounded = attribute(model, images.float(), targets, method="deep_lift", options=options)
    assert float((rounded - exact).abs().max()) < 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_vit, "this network has .*layer normalisation"),
        (gated, "this network has products of activations"),
        (functional, "this network has ReLU"),  # relu_ as a method, whose result might not be what is used
    ],
)
def test_other_networks_are_refused_with_the_reason(build, reason: str) -> None:
    model = build()
    images = torch.zeros(1, 3, 32, 32, dtype=model.dtype)
    with pytest.raises(UsageError, match=reason):
        attribute(model, images, torch.tensor([0]), method="deep_lift")


class Unused(Chain):
    """An activation in place whose result is thrown away, as its effect on the argument suffices."""

    def forward_features(self, images: Tensor) -> Tensor:
        values = self.first(images)
        F.relu(values, inplace=True)
        return self.bent(self.second(self.pool(-values)))


def test_an_effect_in_place_that_would_be_missed_is_refused() -> None:
    torch.manual_seed(0)
    spec = ModelSpec("unused", False, transform={"input_size": (3, SMALL, SMALL)})
    model = Classifier(Unused().double(), spec)
    images = torch.zeros(1, 3, SMALL, SMALL, dtype=torch.float64)
    with pytest.raises(UsageError, match="in place whose result is not used"):
        attribute(model, images, torch.tensor([0]), method="deep_lift")


def test_a_module_used_twice_is_two_calls() -> None:
    class Twice(Chain):
        def forward_features(self, images: Tensor) -> Tensor:
            values = self.bent(self.first(images))
            return self.bent(self.second(self.pool(self.smooth(self.bent(values - 0.1)))))

    torch.manual_seed(0)
    spec = ModelSpec("twice", False, transform={"input_size": (3, SMALL, SMALL)})
    model = Classifier(Twice().double(), spec)
    images = pictures(2)[0][:, :, :SMALL, :SMALL]
    maps = attribute(model, images, torch.tensor([0, 1]), method="deep_lift")
    change = model(images) - model(model.normalise(torch.zeros_like(images)))
    torch.testing.assert_close(
        maps.double().sum(dim=(1, 2)), change.gather(1, torch.tensor([[0], [1]])).squeeze(1), rtol=1e-5, atol=1e-6
    )
