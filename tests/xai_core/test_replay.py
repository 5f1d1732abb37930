"""The part of a network between two layers: the same numbers as the whole, nothing run behind it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.errors import UsageError
from xai_core.layers import captured
from xai_core.models import Classifier, ModelSpec
from xai_core.replay import network_behind, network_between, networks_between


def _swin() -> Classifier:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1)}
    arguments |= {"num_heads": (1, 2, 2, 2), "num_classes": 5}
    module = timm.create_model("swin_tiny_patch4_window7_224", **arguments).double()
    return Classifier(module, ModelSpec("swin_tiny_patch4_window7_224", False, create_args=arguments))


NETWORKS = {"cnn": tiny_cnn, "relu": tiny_relu_cnn, "vit": tiny_vit, "swin": _swin}
PAIRS = [
    ("cnn", "layer1", "layer3"),
    ("cnn", "layer1.0.conv1", "layer1"),
    ("cnn", "layer2.0.conv1", "layer2.0.act2"),
    ("relu", "maxpool", "layer4"),
    ("relu", "layer3", None),
    ("vit", "blocks.0", "blocks.1"),
    ("vit", "blocks.0.attn", "blocks.1.norm1"),
    ("vit", "blocks.0", None),
    ("swin", "layers.0", "layers.2"),
    ("swin", "layers.1.blocks.0", None),
]


@pytest.mark.parametrize(("network", "source", "target"), PAIRS)
def test_replayed_rows_are_what_the_whole_network_computes(network: str, source: str, target: str | None) -> None:
    model = NETWORKS[network]()
    images, _ = pictures(3)
    with torch.no_grad():
        between = network_between(model, images, source, target)
        expected = _whole(model, images, source, target, None)
    torch.testing.assert_close(between.reached, expected)
    owners = torch.tensor([2, 0, 0, 1])
    noise = torch.randn_like(between.activation[owners]) * 0.1
    changed = (between.activation[owners] + noise).requires_grad_(True)
    found = between.run(changed, owners)
    other = changed.detach().requires_grad_(True)
    expected = _whole(model, images[owners], source, target, other)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, changed, direction), torch.autograd.grad(expected, other, direction)
    )


def _whole(model: Classifier, images: Tensor, source: str, target: str | None, changed: Tensor | None) -> Tensor:
    """The target's output of a full pass in which the source's output may be changed."""
    handle = None
    if changed is not None:
        handle = model.layer(source).register_forward_hook(lambda *_: changed)
    try:
        with captured(model, [target] if target else []) as outputs:
            logits = model(images)
    finally:
        if handle is not None:
            handle.remove()
    return outputs[target] if target else logits


def test_only_the_part_between_is_run_and_no_weight_is_copied() -> None:
    model = tiny_relu_cnn()
    images, _ = pictures(2)
    weights = {name: value.data_ptr() for name, value in model.module.state_dict().items()}
    with torch.no_grad():
        between = network_between(model, images, "layer1", "layer2")
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.module.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    # A module that answers without computing is still called: count the convolutions themselves.
    convolved: list[tuple[int, ...]] = []
    convolution = torch.nn.functional.conv2d
    try:
        torch.nn.functional.conv2d = lambda x, *rest: convolved.append(x.shape) or convolution(x, *rest)
        between.run(between.activation, torch.arange(2))
    finally:
        torch.nn.functional.conv2d = convolution
        for handle in handles:
            handle.remove()
    assert len(convolved) == sum("layer2" in name for name in ran) == 3
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in ran)
    assert weights == {name: value.data_ptr() for name, value in model.module.state_dict().items()}
    assert all(not module._forward_hooks and "forward" not in module.__dict__ for module in model.module.modules())


def test_pairs_share_one_pass_and_agree_with_single_ones() -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    passes: list[int] = []
    handle = model.module.patch_embed.proj.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        parts = networks_between(model, images, [("blocks.0", "blocks.1"), ("blocks.1", None), ("blocks.0", None)])
        handle.remove()
    assert len(passes) == 1
    assert parts[0].reached is parts[1].activation and parts[0].activation is parts[2].activation
    behind = network_behind(model, images, "blocks.0")
    owners = torch.tensor([1, 1])
    torch.testing.assert_close(
        parts[2].run(behind.activation, owners), behind.run(behind.activation, owners), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("layer2", "layer1", "layer 'layer1': expected a layer behind 'layer2', got one that comes before it"),
        ("layer2", "layer2.0.conv1", "expected a layer behind 'layer2'"),
        ("layer2", "layer2", "expected a layer behind 'layer2'"),
        ("layer2.0.conv1", "layer2.0.downsample", "expected one that depends on 'layer2.0.conv1'"),
        ("layer1", "layer2.0.bn1", "layer 'layer2.0.bn1': .* overwrites in place"),
        ("layer2.0.bn1", "layer3", "layer 'layer2.0.bn1': .* overwrites in place"),
        ("layer1", "nothing", "layer 'nothing': expected a module"),
    ],
)
def test_pairs_without_a_network_between_them_are_refused(source: str, target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message), torch.no_grad():
        network_between(tiny_relu_cnn(), pictures(2)[0], source, target)


class _Shared(torch.nn.Module):
    """One convolution that is called twice."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 3, 1)
        self.again = torch.nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.again(self.again(self.first(images))).mean(dim=(2, 3))


def test_a_target_that_runs_twice_is_refused() -> None:
    model = Classifier(_Shared(), ModelSpec("shared", False, transform={"input_size": (3, 8, 8)}))
    with pytest.raises(UsageError, match="layer 'again': expected a module that runs once in a pass, got 2 runs"):
        network_between(model, torch.zeros(1, 3, 8, 8), "first", "again")
