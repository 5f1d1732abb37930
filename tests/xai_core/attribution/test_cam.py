"""The CAM family against slow twins written from the papers' formulas, and where it reads its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.layers import as_map, default_cam_layer, layer_problem
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.replay import network_behind

VIT_LAYER = "blocks.1.norm1"
# A model, the layer asked for, and the layer that this must be.
READ: dict[str, tuple[Callable[[], Classifier], str | None, str]] = {
    "relu_cnn": (tiny_relu_cnn, "layer2", "layer2"),
    "signed_cnn": (tiny_cnn, "layer1", "layer1"),
    "vit": (tiny_vit, None, VIT_LAYER),
    "vit_early": (tiny_vit, "blocks.0", "blocks.0"),
}
every_reading = pytest.mark.parametrize("reading", list(READ))


def with_layer(model: Classifier, image: Tensor, layer: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits ``[C]`` of one image when a layer's output is changed."""
    handle = model.module.get_submodule(layer).register_forward_hook(lambda _m, _i, output: change(output))
    try:
        return model(image.unsqueeze(0))[0]
    finally:
        handle.remove()


def grid_of(model: Classifier, output: Tensor) -> Tensor:
    """One image's output as ``[C, h, w]``."""
    if model.family == "cnn":
        return output[0]
    rows, columns = model.token_grid
    return torch.stack(
        [
            output[0, model.num_prefix_tokens + row * columns : model.num_prefix_tokens + (row + 1) * columns]
            for row in range(rows)
        ]
    ).permute(2, 0, 1)


def map_and_gradient(model: Classifier, image: Tensor, layer: str, target: int) -> tuple[Tensor, Tensor]:
    """A layer's map of one image and the target logit's gradient on it, ``[C, h, w]`` each."""
    leaves: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    with_layer(model, image, layer, keep)[target].backward()
    leaf = leaves[0]
    assert leaf.grad is not None
    return grid_of(model, leaf.detach()), grid_of(model, leaf.grad)


def slow_grad_cam(maps: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros_like(maps[0])
    for channel, gradient in zip(maps, gradients, strict=True):
        total += gradient.sum() / gradient.numel() * channel
    return total.relu()


def slow_grad_cam_pp(maps: Tensor, gradients: Tensor) -> Tensor:
    """Equations 5, 7 and 19 for Y = exp(S), in units of exp(S); S has no second derivative."""
    total = torch.zeros_like(maps[0])
    for channel, first in zip(maps, gradients, strict=True):
        presence = sum(max(float(value), 0.0) for value in channel.flatten())
        weight = 0.0
        for gradient in first.flatten().tolist():
            second, third = gradient**2, gradient**3
            if gradient > 0:
                weight += second / (2 * second + presence * third) * gradient
        total += weight * channel
    return total.relu()


def slow_xgrad_cam(maps: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros_like(maps[0])
    for channel, gradient in zip(maps, gradients, strict=True):
        present = [max(value, 0.0) for value in channel.flatten().tolist()]
        if sum(present) > 0:
            shares = [value / sum(present) for value in present]
            total += math.fsum(s * g for s, g in zip(shares, gradient.flatten().tolist(), strict=True)) * channel
    return total.relu()


def slow_layer_cam(maps: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros_like(maps[0])
    for channel, gradient in zip(maps, gradients, strict=True):
        total += torch.where(gradient > 0, gradient, 0) * channel
    return total.relu()


SLOW_GRADIENT_CAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": slow_grad_cam,
    "grad_cam_pp": slow_grad_cam_pp,
    "xgrad_cam": slow_xgrad_cam,
    "layer_cam": slow_layer_cam,
}


@every_reading
@pytest.mark.parametrize("method", list(SLOW_GRADIENT_CAMS))
def test_gradient_cams_equal_their_slow_twins(method: str, reading: str) -> None:
    build, asked, layer = READ[reading]
    model = build()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 3], [1, 4], [2, 0]])
    fast = attribute_classes(model, images, classes, method=method, options={"layer": asked}, native=True)
    slow = torch.stack(
        [
            torch.stack(
                [SLOW_GRADIENT_CAMS[method](*map_and_gradient(model, image, layer, int(one))) for one in row]
            )
            for image, row in zip(images, classes, strict=True)
        ]
    )
    assert int((slow.amax(dim=(2, 3)) > 0).sum()) >= 3
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-9)


def slow_score_cam(model: Classifier, image: Tensor, target: int, layer: str, options: dict[str, Any]) -> Tensor:
    """Definition 3 and Algorithm 1, one channel and one picture after the other."""
    maps, _ = map_and_gradient(model, image, layer, target)
    read = (lambda logits: logits.softmax(0)) if options.get("score") == "probability" else (lambda logits: logits)
    order = sorted(range(len(maps)), key=lambda one: -float(maps[one].var()))[: options.get("channels")]
    increases = []
    for channel in order:
        mask = F.interpolate(
            maps[channel][None, None],
            image.shape[-2:],
            mode="bilinear",
            align_corners=options.get("align_corners", False),
        )[0, 0]
        constant = maps[channel].max() == maps[channel].min()
        mask = mask * 0 if constant else (mask - mask.min()) / (mask.max() - mask.min())
        scores = [read(model(picture.unsqueeze(0))[0])[target] for picture in (image * mask, image * 0)]
        increases.append(float(scores[0] - scores[1]))
    whole = math.fsum(math.exp(one) for one in increases)
    weights = increases if options.get("weights") == "increase" else [math.exp(one) / whole for one in increases]
    return sum(weight * maps[one] for weight, one in zip(weights, order, strict=True)).relu()


@every_reading
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "increase", "score": "probability"},
        {"weights": "increase", "align_corners": True, "channels": 5},
    ],
)
def test_score_cam_equals_its_slow_twin(reading: str, options: dict[str, Any]) -> None:
    build, asked, layer = READ[reading]
    model = build()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [1, 4]])
    fast = attribute_classes(
        model, images, classes, method="score_cam", options={"layer": asked, **options}, native=True, batch_size=5
    )
    slow = torch.stack(
        [
            torch.stack([slow_score_cam(model, image, int(one), layer, options) for one in row])
            for image, row in zip(images, classes, strict=True)
        ]
    )
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-9)


def slow_ablation_cam(model: Classifier, image: Tensor, target: int, layer: str) -> Tensor:
    """The whole network again for every channel, prefix tokens as they were."""
    maps, _ = map_and_gradient(model, image, layer, target)
    logit = model(image.unsqueeze(0))[0, target]
    total = torch.zeros_like(maps[0])
    for channel in range(len(maps)):

        def without(output: Tensor, channel: int = channel) -> Tensor:
            output = output.clone()
            if model.family == "cnn":
                output[:, channel] = 0
            else:
                output[:, model.num_prefix_tokens :, channel] = 0
            return output

        total += (logit - with_layer(model, image, layer, without)[target]) * maps[channel]
    return total.relu()


@every_reading
def test_ablation_cam_equals_its_slow_twin(reading: str) -> None:
    build, asked, layer = READ[reading]
    model = build()
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [1, 4]])
    fast = attribute_classes(
        model, images, classes, method="ablation_cam", options={"layer": asked}, native=True, batch_size=5
    )
    slow = torch.stack(
        [
            torch.stack([slow_ablation_cam(model, image, int(one), layer) for one in row])
            for image, row in zip(images, classes, strict=True)
        ]
    )
    assert slow.amax() > 0
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-9)


def test_ablation_of_some_channels_leaves_the_others_without_weight() -> None:
    model = tiny_vit()
    images, targets = pictures(2)
    whole = attribute(model, images, targets, method="ablation_cam", options={"channels": 24})
    torch.testing.assert_close(whole, attribute(model, images, targets, method="ablation_cam"))
    few = attribute(model, images, targets, method="ablation_cam", options={"channels": 3})
    assert not torch.allclose(few, whole)


def test_the_alphas_squares_and_cubes_are_the_derivatives_of_exp_behind_a_piecewise_linear_network() -> None:
    model = tiny_relu_cnn()
    images, _ = pictures(1)
    features = model.module.forward_features(images)

    def confidence(map_: Tensor) -> Tensor:
        return model.module.forward_head(map_)[0, 2].exp()

    leaf = features.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(model.module.forward_head(leaf)[0, 2], leaf)
    second = torch.autograd.functional.hessian(confidence, leaf.detach()).reshape(16, 16).diagonal()
    torch.testing.assert_close(second, confidence(leaf).detach() * slope.flatten() ** 2)


@pytest.mark.parametrize("method", ["grad_cam_pp", "xgrad_cam"])
def test_invisible_noise_does_not_decide_what_the_map_of_a_signed_layer_shows(method: str) -> None:
    """With the literal sums of a signed map as denominators it would: correlations of -0.4 on DeiT-tiny."""
    model = tiny_vit()
    images, targets = pictures(4)
    generator = torch.Generator().manual_seed(3)
    noisy = images + 1e-4 * torch.randn(images.shape, generator=generator, dtype=images.dtype)
    clean = attribute(model, images, targets, method=method, native=True)
    again = attribute(model, noisy, targets, method=method, native=True)
    torch.testing.assert_close(again, clean, rtol=0, atol=2e-3 * float(clean.max()))


@pytest.mark.parametrize("build", [tiny_relu_cnn, tiny_vit])
@pytest.mark.parametrize("method", ["score_cam", "ablation_cam"])
def test_channels_without_content_cost_no_pass(method: str, build: Callable[[], Classifier]) -> None:
    """Channels that a layer never uses: the maps are those of the others, and nothing is run for them."""
    model = build()
    layer = "layer2" if model.family == "cnn" else VIT_LAYER
    images, targets = pictures(2)
    rows = []
    counter = model.module.get_submodule("fc" if model.family == "cnn" else "head").register_forward_hook(
        lambda _m, _i, output: rows.append(len(output))
    )

    def silence(_module: object, _inputs: object, output: Tensor) -> Tensor:
        keep = torch.arange(output.shape[1 if model.family == "cnn" else 2]) % 4 == 0
        return output * keep.to(output).view((1, -1, 1, 1) if model.family == "cnn" else (1, 1, -1))

    handle = model.module.get_submodule(layer).register_forward_hook(silence)
    assert layer_problem(model, layer) is None
    try:
        rows.clear()
        maps = attribute(model, images, targets, method=method, options={"layer": layer})
    finally:
        handle.remove()
        counter.remove()
    assert maps.isfinite().all()
    channels = 8 if model.family == "cnn" else 24
    # A pass for the layer, one for the baseline or the intact map, and one for each image's used channels.
    assert sum(rows) <= 2 + 2 + 2 * channels // 4


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {}),
    "densenet": ("densenet121", {}),
    "convnext": ("convnext_atto", {}),
    "mobilenet": ("mobilenetv2_100", {}),
    "efficientnet": ("efficientnet_b0", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "pooled": ("vit_wee_patch16_reg1_gap_256", {"img_size": 64}),
}


@cache
def small(title: str) -> Classifier:
    name, arguments = SMALL[title]
    transform = {} if "img_size" in arguments else {"input_size": (3, 64, 64)}
    return load_classifier(
        ModelSpec(name, False, create_args={"num_classes": 7, **arguments}, transform=transform)
    )


LAYERS = [
    ("resnet", "layer2", "layer1"),
    ("resnet", "layer4.1.act2", "layer1"),
    ("densenet", "features.denseblock2", "features.denseblock1"),
    ("convnext", "stages.2", "stages.0"),
    ("mobilenet", "blocks.4", "blocks.1"),
    ("efficientnet", "blocks.5.1", "blocks.1"),
    ("swin", "layers.2.blocks.3", "layers.0"),
    ("distilled", "blocks.11.norm1", "blocks.4.norm1"),
    ("registers", "blocks.6", "blocks.4.norm1"),
    ("pooled", "blocks.13.norm1", "blocks.4.norm1"),
]


@pytest.mark.parametrize(("title", "layer", "low"), LAYERS)
def test_what_lies_behind_a_layer_gives_the_logits_of_the_whole_network(title: str, layer: str, low: str) -> None:
    model = small(title)
    images = torch.randn(3, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    owners = torch.tensor([2, 0, 0, 1])
    whole_flops, flops = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad():
        behind = network_behind(model, images, layer)
        for picked in (owners, owners[1:3]):
            with whole_flops:
                expected = model(images[picked])
            with flops:
                replayed = behind.run(behind.activation[picked], picked)
            torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        changed = behind.activation[owners] + torch.randn(behind.activation[owners].shape)
        assert not torch.allclose(behind.run(changed, owners), model(images[owners]), rtol=1e-6, atol=0)
    assert flops.get_total_flops() < 0.8 * whole_flops.get_total_flops()


@pytest.mark.parametrize(("title", "low"), sorted({(title, low) for title, _, low in LAYERS}))
def test_the_low_stage_is_an_early_map_of_finer_cells(title: str, low: str) -> None:
    model = small(title)
    assert default_cam_layer(model, "low") == low
    assert layer_problem(model, low) is None
    images = torch.randn(2, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    maps = attribute(
        model, images, torch.tensor([0, 6]), method="layer_cam", options={"stage": "low"}, native=True
    )
    assert maps.shape[1:] == ((16, 16) if model.family == "cnn" else model.token_grid)
    assert maps.isfinite().all()


def test_a_final_map_needs_no_more_than_the_head_for_each_channel() -> None:
    model = small("resnet")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one, flops = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with one, torch.no_grad():
        model(images)
    with flops:
        attribute(model, images, torch.tensor([0, 1]), method="ablation_cam")
    assert flops.get_total_flops() < 1.2 * one.get_total_flops()


def test_a_failure_behind_the_layer_leaves_the_model_as_it_was() -> None:
    model = tiny_vit()
    images, _ = pictures(2)
    with torch.no_grad():
        expected = model(images)
        behind = network_behind(model, images, VIT_LAYER)
        with pytest.raises(RuntimeError):
            behind.run(behind.activation[:, :, :3], torch.tensor([0, 1]))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    for module in model.module.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks


def test_a_layer_that_runs_twice_cannot_be_replaced() -> None:
    model = tiny_relu_cnn()
    shared = torch.nn.ReLU()
    model.module.layer1[0].act2 = shared
    model.module.layer2[0].act2 = shared
    with pytest.raises(UsageError, match="runs once in a pass, got 2"):
        network_behind(model, pictures(1)[0], "layer1.0.act2")


class AddsInPlace(torch.nn.Module):
    """A network in which a sum overwrites the output of a layer, and both sides of the next layer use it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        early = self.first(images)
        early += 1
        late = self.second(early)
        return (late + early).mean(dim=(2, 3))


def test_results_overwritten_in_place_are_computed_again() -> None:
    torch.manual_seed(0)
    model = tiny_cnn()
    model.module = AddsInPlace().double().requires_grad_(False)
    images, _ = pictures(3)
    owners = torch.tensor([1, 1, 1])
    with torch.no_grad():
        behind = network_behind(model, images, "second")
        torch.testing.assert_close(behind.run(behind.activation[owners], owners), model(images)[owners])


@pytest.mark.parametrize(
    "method", ["grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "score_cam", "ablation_cam"]
)
@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ("blocks.7", "did you mean 'blocks.0'|expected a module"),
        ("blocks.1", "influence the logits.*use 'blocks.1.norm1'"),
        ("norm", "influence the logits"),
        ("head", "spatial positions"),
        ("blocks.0.attn.attn_drop", "runs in the forward pass"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused(method: str, layer: str, complaint: str) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=complaint):
        attribute(tiny_vit(), images, targets, method=method, options={"layer": layer})


def test_a_default_layer_is_judged_by_what_it_influences() -> None:
    """With norms behind attention and MLP, the last block's first norm no longer reaches the class token."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    from timm.models.vision_transformer import ResPostBlock

    module = timm.create_model("vit_tiny_patch16_224", block_fn=ResPostBlock, **arguments)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    model = Classifier(module, ModelSpec("vit_tiny_patch16_224", False, create_args=arguments))
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="influence the logits"):
        attribute(model, images.float(), targets, method="grad_cam")
    assert (
        attribute(model, images.float(), targets, method="grad_cam", options={"layer": "blocks.0"})
        .isfinite()
        .all()
    )


def test_under_a_head_of_zeros_every_layer_is_readable_and_every_map_zero() -> None:
    model = tiny_vit()
    torch.nn.init.zeros_(model.module.head.weight)
    images, targets = pictures(2)
    for method in ("grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "ablation_cam"):
        assert not attribute(model, images, targets, method=method).any(), method


def test_score_cam_refuses_a_map_of_one_cell() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="single cell"):
        attribute(tiny_cnn(), images, targets, method="score_cam")


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("layer_cam", {"stage": "middle"}, "layer_cam.stage: expected high or low, got 'middle'"),
        ("layer_cam", {"stage": "low", "layer": "blocks.0"}, "layer_cam.stage.*set one"),
        ("score_cam", {"score": "loss"}, "score_cam.score: expected logit or probability, got 'loss'"),
        ("score_cam", {"weights": "none"}, "score_cam.weights: expected softmax or increase, got 'none'"),
        ("score_cam", {"channels": 0}, "score_cam.channels: expected at least 1 or none, got 0"),
        ("ablation_cam", {"channels": 0}, "ablation_cam.channels: expected at least 1 or none, got 0"),
    ],
)
def test_options_are_checked(method: str, options: dict[str, Any], complaint: str) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=complaint):
        attribute(tiny_vit(), images, targets, method=method, options=options)


def test_maps_of_tokens_leave_the_prefix_out() -> None:
    model = small("registers")
    tokens = torch.randn(2, 5 + 16, 384)
    changed = tokens.clone()
    changed[:, :5] = 0
    torch.testing.assert_close(as_map(model, tokens, "x"), as_map(model, changed, "x"))
