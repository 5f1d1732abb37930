"""IA, EA and PA against twins from the paper's formulas in float64, patch by patch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.xai_core.inherent.small import PATCH, SIDE, built, images
from xai_core.attribution import attribute
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, load_classifier

GRID = SIDE // PATCH


def double(kind: str, **arguments: object) -> Classifier:
    model = built(kind, **arguments)
    model.module.double()
    return model


def patch_of(picture: Tensor, row: int, column: int) -> Tensor:
    return picture[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]


def slow_weighted(module: torch.nn.Module, picture: Tensor) -> Tensor:
    """E' of one picture, a patch at a time."""
    importance = module.importance_net(picture[None])[0]
    rows = [
        [
            importance[row, column] * module.component_net(patch_of(picture, row, column)[None])[0]
            for column in range(GRID)
        ]
        for row in range(GRID)
    ]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


@torch.no_grad()
def test_ia_sums_the_weighted_embeddings_of_its_patches() -> None:
    module = double("ia").module
    pictures = images()
    logits = module(pictures)
    for b, picture in enumerate(pictures):
        weighted = slow_weighted(module, picture)
        total = torch.zeros(6, dtype=torch.float64)
        for row in range(GRID):
            for column in range(GRID):
                total += weighted[:, row, column]
        first, _, second = module.head
        hidden = (first.weight @ total + first.bias).clamp(min=0)
        torch.testing.assert_close(logits[b], second.weight @ hidden + second.bias)
    assert logits.std(dim=0).min() > 1e-3


@torch.no_grad()
def test_ea_looks_at_the_weighted_embeddings_in_their_places() -> None:
    module = double("ea").module
    pictures = images()
    logits = module(pictures)
    for b, picture in enumerate(pictures):
        features = module.context_net.blocks(slow_weighted(module, picture)[None])[0]
        expected = module.context_net.head(features.flatten(1).amax(dim=1))
        torch.testing.assert_close(logits[b], expected)
    assert logits.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("inverted", [False, True])
@torch.no_grad()
def test_pa_sees_what_the_threshold_leaves(inverted: bool) -> None:
    colours = {"importance_mean": [0.5, 0.4, 0.3], "importance_std": [0.2, 0.3, 0.4]}
    threshold = 0.5
    module = double("pa", threshold=threshold, inverted=inverted, **colours).module
    plain = load_classifier(
        ModelSpec("resnet10t", False, create_args=module.config.backbone_args | {"num_classes": 3})
    )
    plain.module.double()
    missing, unexpected = plain.module.load_state_dict(module.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("importance_net.") for name in unexpected)
    pictures = images()
    mean, std = (torch.tensor(module.pretrained_cfg[name]).double().view(3, 1, 1) for name in ("mean", "std"))
    own_mean, own_std = (torch.tensor(values).double().view(3, 1, 1) for values in colours.values())
    hidden = 0
    for b, picture in enumerate(pictures):
        importance = module.importance_net(((picture * std + mean - own_mean) / own_std)[None])[0]
        masked = picture.clone()
        for row in range(GRID):
            for column in range(GRID):
                if (importance[row, column] < threshold) != inverted:
                    patch_of(masked, row, column).zero_()
                    hidden += 1
        # The constants of the renormalisation are float32.
        torch.testing.assert_close(module(pictures)[b], plain(masked[None])[0], rtol=1e-6, atol=1e-6)
    assert 0 < hidden < len(pictures) * GRID**2


@torch.no_grad()
def test_a_patch_influences_no_other_patchs_embedding() -> None:
    module = double("ia").module
    pictures = images(1)
    other = pictures.clone()
    patch_of(other[0], 1, 2).add_(1.0)
    importance, weighted = module.weigh(pictures)
    importance_other, weighted_other = module.weigh(other)
    far = (weighted / importance - weighted_other / importance_other).abs().amax(dim=1)[0] > 1e-9
    assert far.nonzero().tolist() == [[1, 2]]


def test_pa_without_a_threshold_is_the_plain_backbone() -> None:
    model = built("pa", lively=False)
    arguments = {"num_classes": 3, **model.module.config.backbone_args}
    plain = load_classifier(ModelSpec("resnet10t", False, create_args=arguments))
    assert type(model.module) is type(plain.module)
    assert list(model.module.state_dict()) == list(plain.module.state_dict())
    assert torch.equal(model(images(2, dtype=torch.float32)), plain(images(2, dtype=torch.float32)))


def test_pa_keeps_the_layers_of_its_backbone() -> None:
    arguments = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"img_size": SIDE, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    }
    model = built("pa", threshold=0.5, **arguments)
    assert (model.family, model.token_grid) == ("vit", (4, 4))
    pictures = images(2, dtype=torch.float32)
    targets = torch.tensor([0, 1])
    kept = model.module.kept(model.module.importance(pictures))
    for method in ("attention_rollout", "input_x_gradient", "grad_cam"):
        maps = attribute(model, pictures, targets, method=method)
        assert maps.shape == (2, SIDE, SIDE)
        if method == "input_x_gradient":
            large = F.interpolate(kept.float()[:, None], size=(SIDE, SIDE))[:, 0].bool()
            assert bool((maps[~large] == 0).all())
            assert bool((maps[large] != 0).any())


def test_a_map_of_pa_is_its_backbones_of_the_masked_picture() -> None:
    model = built("pa", threshold=0.5)
    pictures, targets = images(2, dtype=torch.float32), torch.tensor([0, 1])
    arguments = model.module.config.backbone_args | {"num_classes": 3}
    transform = {"input_size": (3, SIDE, SIDE)}
    plain = load_classifier(ModelSpec("resnet10t", False, create_args=arguments, transform=transform))
    plain.module.load_state_dict(model.module.state_dict(), strict=False)
    kept = model.module.kept(model.module.importance(pictures))
    large = F.interpolate(kept.float()[:, None], size=(SIDE, SIDE))
    for method in ("lrp_epsilon", "guided_backprop", "gradient"):
        own = attribute(model, pictures, targets, method=method)
        theirs = attribute(plain, pictures * large, targets, method=method)
        # Gradients of pixels that the network never sees are 0.
        torch.testing.assert_close(own, theirs * large[:, 0])
        assert bool((own != 0).any())


@pytest.mark.parametrize("kind", ["ia", "ea"])
def test_gradients_of_a_trained_networks_input_pass_through_its_importance(kind: str) -> None:
    module = double(kind).module
    picture = images(1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(module(picture)[0, 0], picture)
    direction = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (module(picture + step) - module(picture - step))[0, 0] / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["ia", "ea", "pa"])
def test_methods_explain_all_three(kind: str) -> None:
    model = built(kind, **({"threshold": 0.5} if kind == "pa" else {}))
    pictures = images(2, dtype=torch.float32)
    for method, options in (
        ("grad_cam", {}),
        ("integrated_gradients", {"steps": 2}),
        ("occlusion", {"window": 4, "stride": 4}),
    ):
        maps = attribute(model, pictures, torch.tensor([0, 1]), method=method, options=options)
        assert maps.shape == (2, SIDE, SIDE)
        assert bool(maps.isfinite().all())


@pytest.mark.parametrize("kind", ["ia", "ea", "pa"])
def test_pictures_of_another_size_are_refused(kind: str) -> None:
    model = built(kind, **({"threshold": 0.5} if kind == "pa" else {}))
    with pytest.raises(UsageError, match=r"pictures: expected 16 x 16 pixels.*got 32 x 32; set"):
        model(images(1, 32, torch.float32))


@torch.no_grad()
def test_results_depend_on_no_other_picture_of_the_batch() -> None:
    for kind in ("ia", "ea", "pa"):
        module = double(kind, **({"threshold": 0.5} if kind == "pa" else {})).module
        pictures = images(5)
        alone = torch.cat([module(picture[None]) for picture in pictures])
        torch.testing.assert_close(module(pictures), alone)


def test_half_precision_sums_in_single() -> None:
    model = built("ia")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, weighted = model.module.weigh(images(2, dtype=torch.float32))
        total = model.module.decide(weighted)
    assert bool(total.isfinite().all())
    large = torch.full((1, 6, 64, 64), 1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        # In bfloat16 a sum of ones would stop at 256.
        torch.testing.assert_close(model.module.decide(large), model.module.head(torch.full((1, 6), 4096.0)))
