"""The three networks: the paper's counts of blocks, their shapes, and patches."""

from __future__ import annotations

import pytest
import torch
from timm.models.resnet import BasicBlock

import xai_core.inherent  # noqa: F401
from tests.xai_core.inherent.small import images
from xai_core.errors import UsageError
from xai_core.inherent.networks import ComponentNet, ContextNet, ImportanceNet, halvings
from xai_core.inherent.patches import cut_patches, enlarge, kept_patches
from xai_core.models import ModelSpec, load_classifier


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32, 56, 112])
def test_every_patch_size_of_the_paper_gives_logits_and_an_importance_a_patch(patch_size: int) -> None:
    arguments = {"num_classes": 5, "patch_size": patch_size, "embed_dim": 4}
    widths = {"importance_width": 2, "component_width": 2}
    model = load_classifier(ModelSpec("vitrine_ia", False, create_args={**arguments, **widths}))
    with torch.no_grad():
        importance, weighted = model.module.weigh(images(2, 224, torch.float32))
        logits = model.module.decide(weighted)
    side = 224 // patch_size
    assert importance.shape == (2, side, side)
    assert bool(((importance >= 0) & (importance <= 1)).all())
    assert weighted.shape == (2, 4, side, side)
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("embed_dim", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_small_pictures_with_every_embedding_of_the_paper(patch_size: int, embed_dim: int) -> None:
    arguments = {"num_classes": 5, "img_size": 32, "patch_size": patch_size, "embed_dim": embed_dim}
    widths = {"importance_width": 2, "component_width": 2, "context_width": 2}
    model = load_classifier(ModelSpec("vitrine_ea", False, create_args={**arguments, **widths}))
    with torch.no_grad():
        assert model(images(2, 32, torch.float32)).shape == (2, 5)
    assert model.input_size == (32, 32)


def test_numbers_of_residual_blocks_are_the_papers() -> None:
    def blocks(network: torch.nn.Module) -> int:
        return sum(isinstance(module, BasicBlock) for module in network.modules())

    assert blocks(ImportanceNet(32, 4, 4)) == 8
    assert blocks(ComponentNet(4, 6, 4)) == 3
    assert blocks(ContextNet(6, 8, 5, 4)) == 3


def test_the_default_importance_net_is_a_resnet_18() -> None:
    own = ImportanceNet(224, 16)
    theirs = load_classifier(ModelSpec("resnet18", False, create_args={"num_classes": 14 * 14})).module
    assert [tuple(p.shape) for p in own.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
    own.load_state_dict(dict(zip(own.state_dict(), theirs.state_dict().values(), strict=True)))
    picture = images(1, 224, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(picture).flatten(1), theirs(picture).sigmoid())


def test_maps_are_halved_down_to_two_by_two() -> None:
    assert [halvings(side, 3) for side in (2, 4, 7, 112)] == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]]


def test_patches_are_cut_row_by_row() -> None:
    pictures = images(2, 12)
    cut = cut_patches(pictures, 4).unflatten(0, (2, 3, 3))
    for b in range(2):
        for row in range(3):
            for column in range(3):
                expected = pictures[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                assert torch.equal(cut[b, row, column], expected)


def test_a_grid_is_enlarged_to_constant_patches() -> None:
    grid = torch.arange(8.0).view(2, 2, 2)
    large = enlarge(grid, (6, 4))
    assert large.shape == (2, 1, 6, 4)
    for y in range(6):
        for x in range(4):
            assert torch.equal(large[:, 0, y, x], grid[:, y // 3, x // 2])


def test_inverted_masks_are_complements_also_at_the_threshold_itself() -> None:
    importance = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    kept = kept_patches(importance, 0.5)
    assert kept.tolist() == [False, False, True, True, True]
    assert torch.equal(kept_patches(importance, 0.5, inverted=True), ~kept)
    assert bool(kept_patches(importance, 0.0).all())
    assert not bool(kept_patches(importance, 0.0, inverted=True).any())


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("vitrine_ia", {"patch_size": 5}, r"patch_size: expected a divisor of img_size 224 \(2, 4, 7, 8.*got 5"),
        ("vitrine_ia", {"patch_size": 0}, "patch_size: expected a divisor"),
        ("vitrine_ia", {"img_size": 32, "patch_size": 64}, "patch_size: expected a divisor"),
        ("vitrine_ia", {"embed_dim": 0}, "embed_dim: expected a number of channels of at least 1, got 0"),
        ("vitrine_ia", {"importance_width": 0}, "importance_width: expected"),
        ("vitrine_ea", {"context_width": 0}, "context_width: expected"),
        ("vitrine_ia", {"mean": [0.5]}, "mean: expected three numbers"),
        ("vitrine_ia", {"depth": 4}, "model.create_args: vitrine_ia does not take them"),
        ("vitrine_pa", {"threshold": 1.5}, "threshold: expected a number from 0 to 1, got 1.5"),
        ("vitrine_pa", {"threshold": -0.1}, "threshold: expected a number from 0 to 1"),
        (
            "vitrine_pa",
            {"backbone_args": {"pretrained_cfg_overlay": {"file": "resnet50.bin"}}},
            "file: expected a .safetensors file, got 'resnet50.bin'",
        ),
        ("vitrine_pa", {"patch_size": 15}, "patch_size: expected a divisor"),
        (
            "vitrine_pa",
            {"backbone": "resnet_50"},
            "backbone: expected a timm model, got 'resnet_50'; did you mean",
        ),
    ],
)
def test_networks_that_cannot_be_built_are_refused(name: str, arguments: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_classifier(ModelSpec(name, False, create_args=arguments))


def test_there_are_no_weights_to_fetch_for_a_network_of_ones_own() -> None:
    with pytest.raises(UsageError, match=r"model\.pretrained: there are no weights of vitrine_ia"):
        load_classifier(ModelSpec("vitrine_ia"))
