"""SRD against the forward recursion of feature vectors written out, and what it must conserve."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.differentiable import differentiable_maps, second_derivatives
from xai_core.attribution.explainer import Explainer
from xai_core.attribution.propagation.sharing_ratio import sharing_ratio_rules, start_at
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec
from xai_core.registry import methods

SIDE, WIDTH = 8, 4


class Mini(nn.Module):
    """Convolution, norm, activation, pooling; a residual sum over an activation; a head."""

    num_classes = 3

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.act1 = activation
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.act2 = type(activation)()
        self.third = nn.Conv2d(WIDTH, WIDTH, 2, stride=1, bias=False)
        self.act3 = type(activation)()
        self.fc = nn.Linear(WIDTH, self.num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.act1(self.norm(self.first(images))))
        return self.act3(F.avg_pool2d(pooled, 2, 1) + self.third(self.act2(self.second(pooled))))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def mini(activation: nn.Module) -> Classifier:
    torch.manual_seed(5)
    module = Mini(activation).double()
    module.norm.running_mean.uniform_(-0.3, 0.3)
    module.norm.running_var.uniform_(0.5, 1.5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return Classifier(module, ModelSpec("mini", False, transform={"input_size": (3, SIDE, SIDE)}))


def vectors(tensor: Tensor) -> Tensor:
    """Feature vectors ``[positions, C]`` of one picture ``[C, h, w]``."""
    return tensor.flatten(1).T


def blocks(function, at: Tensor) -> Tensor:
    """What each source position alone puts into each target position, ``[targets, sources, C]``: linear maps."""
    out = function(at)
    found = jacobian(function, at)  # [C', h', w', C, h, w]
    rows = found.reshape(out.shape[0], out[0].numel(), at.shape[0], at[0].numel())
    return torch.einsum("djcs,cs->jsd", rows, at.flatten(1))


def equal_shares(side_in: int, side_out: int, kernel: int, padding: int, live: Tensor) -> Tensor:
    """The share of each live input in a bias of each output, ``[targets, sources]``; stride 1."""
    shares = torch.zeros(side_out * side_out, side_in * side_in, dtype=torch.float64)
    for y in range(side_out):
        for x in range(side_out):
            seen = [
                (y + dy - padding) * side_in + x + dx - padding
                for dy in range(kernel)
                for dx in range(kernel)
                if 0 <= y + dy - padding < side_in and 0 <= x + dx - padding < side_in
            ]
            seen = [one for one in seen if live[one]]
            for one in seen:
                shares[y * side_out + x, one] = 1 / len(seen)
    return shares


def ratios(contributions: Tensor, target: Tensor) -> Tensor:
    """Equation 3, ``[targets, sources]``, from what sources put in ``[targets, sources, C]``."""
    return torch.einsum("jsd,jd->js", contributions, target) / target.square().sum(1, keepdim=True)


def slow_ierfs(module: Mini, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 2 forwards: the last feature vectors ``[C, h, w]`` and their iERFs ``[positions, pixels]``."""

    def without_bias(layer: nn.Conv2d, value: Tensor) -> Tensor:
        return F.conv2d(value[None], layer.weight, None, layer.stride, layer.padding, 1, layer.groups)[0]

    scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
    before1 = module.norm(module.first(picture[None]))[0]
    shift = module.norm.bias + (module.first.bias - module.norm.running_mean) * scale
    given = blocks(lambda x: without_bias(module.first, x) * scale.view(-1, 1, 1), picture)
    of_bias = equal_shares(SIDE, SIDE, 3, 1, vectors(picture).abs().sum(1) > 0)
    to_first = ratios(given, vectors(before1))
    to_first = to_first + (vectors(before1) @ shift / vectors(before1).square().sum(1)).view(-1, 1) * of_bias
    ierf1 = to_first  # of equation 2's base case, the unit matrices

    one = module.act1(before1)
    pooled = module.pool(one[None])[0]
    selected = blocks(lambda x: module.pool(x[None])[0], one)
    share_of_pooled = torch.nan_to_num(ratios(selected, vectors(pooled)))

    before2 = module.second(pooled[None])[0]
    two = module.act2(before2)
    through = blocks(lambda x: without_bias(module.second, module.pool(x[None])[0]), one)
    to_second = ratios(through, vectors(before2))
    side = pooled.shape[-1]
    of_bias = equal_shares(side, side, 3, 1, vectors(pooled).abs().sum(1) > 0)
    taken = vectors(before2) @ module.second.bias / vectors(before2).square().sum(1)
    to_second = to_second + taken.view(-1, 1) * (of_bias @ share_of_pooled)
    ierf2 = to_second @ ierf1

    before3 = F.avg_pool2d(pooled[None], 2, 1)[0] + without_bias(module.third, two)
    by_sum = blocks(lambda x: F.avg_pool2d(module.pool(x[None]), 2, 1)[0], one)
    by_third = blocks(lambda x: without_bias(module.third, x), two)
    ierf3 = ratios(by_sum, vectors(before3)) @ ierf1 + ratios(by_third, vectors(before3)) @ ierf2
    return module.act3(before3), ierf3


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ELU(), nn.LeakyReLU(), nn.SiLU(), nn.GELU(), nn.Tanh()])
def test_the_backward_form_is_the_forward_recursion(activation: nn.Module) -> None:
    model = mini(activation)
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        features, ierfs = slow_ierfs(model.module, image[0])
    torch.testing.assert_close(features, model.module.forward_features(image)[0])
    torch.testing.assert_close(ierfs.sum(1), torch.ones(len(ierfs), dtype=torch.float64))
    weights = model.module.fc.weight / features[0].numel()
    scores = weights @ features.flatten(1) * 1.0  # equation 6: [classes, positions]
    for start, values in {
        "raw": scores[1],
        "mean": scores[1] - scores.mean(0),
        "clamped_mean": (scores[1] - scores.mean(0)).relu(),
    }.items():
        expected = (values @ ierfs).view(SIDE, SIDE)
        got = attribute(model, image, torch.tensor([1]), method="srd", options={"start": start})[0].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_the_ierf_of_one_vector() -> None:
    model = mini(nn.ReLU())
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        _, ierfs = slow_ierfs(model.module, image[0])
    pixels = image.requires_grad_(True)
    with sharing_ratio_rules(model.module):
        features = model.module.forward_features(pixels)
    only = torch.zeros(features.shape[0], *features.shape[2:], dtype=torch.float64)
    only[0, 1, 2] = 1
    (gradient,) = torch.autograd.grad(features, pixels, start_at(features.detach(), only))
    place = features.shape[3] + 2
    torch.testing.assert_close((gradient * pixels).sum(1).flatten().detach(), ierfs[place])


KINDS = {
    "resnet10t": {"channels": (8, 8, 16, 16), "stem_width": 8},
    "vgg11": {"mlp_ratio": 0.01},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2, 2, 2)},
    "mobilenetv2_035": {},
    "efficientnet_lite0": {},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {},
}


def built(name: str) -> Classifier:
    """A small network with biases, shifts and scales that are none of them 0 or 1."""
    torch.manual_seed(1)
    module = timm.create_model(name, num_classes=CLASSES, **KINDS[name]).double()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return Classifier(module, ModelSpec(name, False, transform={"input_size": (3, 64, 64)}))


@pytest.mark.parametrize("name", KINDS)
def test_relevance_is_conserved(name: str) -> None:
    """Scales differ in where the relevance lies, not in how much there is."""
    model = built(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    classes = torch.tensor([[0, 2], [1, 3]])
    sums = {
        scale: attribute_classes(
            model, images, classes, method="srd", options={"scale": scale, "start": "mean"}, native=True
        )
        .double()
        .sum(dim=(2, 3))
        for scale in ("low", "high", "input")
    }
    assert sums["low"].abs().max() > 0
    torch.testing.assert_close(sums["high"], sums["low"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sums["input"], sums["low"], rtol=1e-4, atol=1e-9)


# One of each kind of layer; EfficientNet-Lite has those of MobileNetV2.
DIFFERENTIATED = [*((name, "input") for name in KINDS if name != "efficientnet_lite0"), ("convnext_atto", "high")]


@pytest.mark.parametrize(("name", "scale"), DIFFERENTIATED)
def test_maps_are_differentiated_by_the_images(name: str, scale: str) -> None:
    """Through vectors, gates, norms and what biases take: as finite differences say, on the softened network."""
    model = built(name)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    explainer = Explainer("srd", methods.get("srd").options(scale=scale, start="mean"))

    def weighted(some: Tensor) -> Tensor:
        maps = differentiable_maps(explainer, model, some.requires_grad_(True), torch.tensor([0, 3]))
        return (maps * weights).sum(dim=(1, 2))

    step = 1e-6
    with second_derivatives(model, softplus_beta=10.0):
        leaves = images.clone()
        (slope,) = torch.autograd.grad(weighted(leaves).sum(), leaves)
        ahead, behind = (weighted(images + sign * step * direction).detach() for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    norm = slope.flatten(1).norm(dim=1)
    assert (norm > 0).all()
    assert (((slope * direction).sum(dim=(1, 2, 3)) - expected).abs() < 1e-4 * norm).all()


POOLINGS = {
    "adaptive average": nn.AdaptiveAvgPool2d(3),
    "adaptive maximum": nn.AdaptiveMaxPool2d(3),
    "average of overlapping windows": nn.AvgPool2d(3, 2, padding=1),
    "average without the border": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "maximum of overlapping windows": nn.MaxPool2d(3, 2, padding=1),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_shares_all_that_it_gets(pooling: str) -> None:
    """Against equation 3 with what each vector behind the first activation puts through the pooling."""
    model = mini(nn.ReLU())
    module, image = model.module, torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).double()
    module.pool = POOLINGS[pooling]

    def to_second(value: Tensor) -> Tensor:
        return F.conv2d(module.pool(value[None]), module.second.weight, None, 1, 1, 1, 2)[0]

    module.second.bias = None
    with torch.no_grad():
        one = module.act1(module.norm(module.first(image[None])))[0]
        target = module.act2(module.second(module.pool(one[None])))[0]
        expected = ratios(blocks(to_second, one), vectors(to_second(one)))
    torch.testing.assert_close(expected.sum(1), torch.ones(len(expected), dtype=torch.float64))
    with torch.enable_grad(), sharing_ratio_rules(module):
        leaf = one[None].clone().requires_grad_(True)
        reached = module.act2(module.second(module.pool(leaf)))
    for at in range(len(expected)):
        relevance = torch.zeros(1, *reached.shape[2:], dtype=torch.float64)
        relevance.view(-1)[at] = 1
        start = start_at(reached.detach(), relevance)
        (gradient,) = torch.autograd.grad(reached, leaf, start, retain_graph=True)
        alive = target.flatten(1)[:, at].any()
        torch.testing.assert_close((gradient * leaf).sum(1).flatten().detach(), expected[at] * alive)


def test_maps_are_those_of_their_scale() -> None:
    model = tiny_relu_cnn()
    images, targets = pictures(2)
    shapes = {
        scale: tuple(attribute(model, images, targets, method="srd", options={"scale": scale}, native=True).shape)
        for scale in ("input", "high", "low")
    }
    assert shapes == {"input": (2, SIZE, SIZE), "high": (2, SIZE // 8, SIZE // 8), "low": (2, 1, 1)}


def test_refusals() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=r"srd\.scale: expected one of input, high, low, got 'middle'"):
        attribute(tiny_relu_cnn(), images, targets, method="srd", options={"scale": "middle"})
    with pytest.raises(UsageError, match="srd"):
        attribute(tiny_vit(), images, targets, method="srd")
