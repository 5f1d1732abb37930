"""Agreement with zennit, an independent implementation of the same rules, on torchvision's networks.

The same weights are put into timm's network of that name; zennit re-writes torchvision's residual blocks, ours are
left as timm wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from zennit.attribution import Gradient
from zennit.canonizers import AttributeCanonizer, SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, ZPlus
from zennit.torchvision import ResNetCanonizer, VGGCanonizer
from zennit.types import Linear

from tests.agreement.test_captum import pearson
from tests.agreement.test_captum_perturbation import real
from xai_core.attribution import attribute
from xai_core.models import Classifier, ModelSpec

SIZE = 64
CLASSES = 7
# Units of the first fully connected layer of VGG, which would else need gigabytes.
NARROW = 32

COMPOSITES: dict[str, Callable[..., Composite]] = {
    "lrp_epsilon": lambda **named: LayerMapComposite([*layer_map_base(), (Linear, Epsilon())], **named),
    "lrp_z_plus": lambda **named: LayerMapComposite([*layer_map_base(), (Linear, ZPlus())], **named),
    "lrp_epsilon_plus": EpsilonPlus,
}


def lively(module: nn.Module) -> nn.Module:
    """Weights of unit gain, random biases and statistics: all parts of the rules matter."""
    generator = torch.Generator().manual_seed(3)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.weight.copy_(draw(part.weight) * (2 / part.weight[0].numel()) ** 0.5)
                if part.bias is not None:
                    part.bias.copy_(0.1 * draw(part.bias))
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(1 + 0.2 * draw(part.weight))
                part.bias.copy_(0.1 * draw(part.bias))
                part.running_mean.copy_(0.1 * draw(part.running_mean))
                part.running_var.copy_((1 + 0.2 * draw(part.running_var)).abs())
    return module.double().eval()


def renamed_vgg(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's classifier as timm's convolutions over the whole map."""
    fully_connected = {
        "classifier.0": "pre_logits.fc1",
        "classifier.3": "pre_logits.fc2",
        "classifier.6": "head.fc",
    }
    found = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        found[f"{fully_connected.get(layer, layer)}.{kind}"] = value
    first, second = found["pre_logits.fc1.weight"], found["pre_logits.fc2.weight"]
    found["pre_logits.fc1.weight"] = first.unflatten(1, (-1, 7, 7))
    found["pre_logits.fc2.weight"] = second[:, :, None, None]
    return found


def networks(name: str) -> tuple[nn.Module, Classifier]:
    torch.manual_seed(0)
    peer = getattr(torchvision.models, name)(num_classes=CLASSES)
    if name.startswith("vgg"):
        peer.classifier[0], peer.classifier[3] = nn.Linear(512 * 7 * 7, NARROW), nn.Linear(NARROW, 4096)
    lively(peer)
    narrow = {"mlp_ratio": NARROW / 4096} if name.startswith("vgg") else {}
    ours = timm.create_model(name, num_classes=CLASSES, **narrow).double()
    weights = peer.state_dict()
    ours.load_state_dict(renamed_vgg(weights) if name.startswith("vgg") else weights)
    transform = {"input_size": (3, SIZE, SIZE)}
    return peer, Classifier(
        ours, ModelSpec(name, False, create_args={"num_classes": CLASSES}, transform=transform)
    )


def relevance(peer: nn.Module, images: Tensor, targets: Tensor, composite: Composite) -> Tensor:
    """zennit's relevance of the pixels, started from the logit's own value as ours is."""
    with Gradient(model=peer, composite=composite) as attributor:
        _, result = attributor(images, lambda logits: logits * nn.functional.one_hot(targets, logits.shape[1]))
    return result.sum(1)


def inputs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


@pytest.mark.parametrize("method", COMPOSITES)
@pytest.mark.parametrize(
    ("name", "canonizer"), [("resnet18", ResNetCanonizer), ("resnet50", ResNetCanonizer), ("vgg16", VGGCanonizer)]
)
def test_the_same_network_of_torchvision(name: str, canonizer: type, method: str) -> None:
    peer, ours = networks(name)
    images, targets = inputs(2)
    torch.testing.assert_close(peer(images), ours(images))
    expected = relevance(peer, images, targets, COMPOSITES[method](canonizers=[canonizer()]))
    got = attribute(ours, images, targets, method=method)
    for mine, theirs in zip(got, expected, strict=True):
        assert pearson(mine, theirs) >= 0.999
        # The scale agrees too; zennit also stabilises residual sums, where summands may cancel.
        assert float((mine - theirs).norm() / theirs.norm()) < (0.05 if method == "lrp_epsilon" else 1e-3)


class SumInModule(AttributeCanonizer):
    """torchvision's inverted residual blocks with their sum as a module, which is what zennit can hook."""

    def __init__(self) -> None:
        super().__init__(self._attribute_map)

    @classmethod
    def _attribute_map(cls, _name: str, module: nn.Module) -> dict[str, object] | None:
        if not isinstance(module, InvertedResidual) or not module.use_res_connect:
            return None
        return {"forward": cls.forward.__get__(module), "canonizer_sum": Sum()}

    @staticmethod
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.canonizer_sum(torch.stack([x, self.conv(x)], dim=-1))


@pytest.mark.shared
@pytest.mark.parametrize("method", COMPOSITES)
def test_a_trained_network_on_a_photograph(method: str, shared_data: Path) -> None:
    """timm's MobileNetV2 has torchvision's layers in the same order."""
    ours, images, targets = real("mobilenetv2_100", shared_data)
    written = torchvision.models.mobilenet_v2().double().eval()
    names, weights = list(written.state_dict()), list(ours.module.state_dict().values())
    written.load_state_dict(dict(zip(names, weights, strict=True)))
    # torchvision pools by a function, where zennit would spread relevance evenly over the map.
    peer = nn.Sequential(written.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), written.classifier)
    torch.testing.assert_close(peer(images), ours(images))
    canonizers = [SequentialMergeBatchNorm(), SumInModule()]
    expected = relevance(peer, images, targets, COMPOSITES[method](canonizers=canonizers))
    assert pearson(attribute(ours, images, targets, method=method), expected) >= 0.999


def test_a_convolution_over_the_whole_map_is_fully_connected() -> None:
    """Told by its place in timm's VGG: zennit itself, on timm's way to write it, would use the other rule."""
    peer, ours = networks("vgg16")
    images, targets = inputs(1)
    got = attribute(ours, images, targets, method="lrp_epsilon_plus")
    as_timm_writes_it = relevance(ours.module, images, targets, EpsilonPlus(canonizers=[VGGCanonizer()]))
    as_torchvision_does = relevance(peer, images, targets, EpsilonPlus(canonizers=[VGGCanonizer()]))
    assert pearson(got, as_torchvision_does) >= 0.999
    assert pearson(got, as_timm_writes_it) < 0.999
