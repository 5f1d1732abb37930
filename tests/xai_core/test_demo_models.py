"""The packaged demo models: small, loadable by name through timm, and right about the synthetic toys."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xai_core.demo_models import DEMO_MODELS, weights_path
from xai_core.synthetic import CLASS_NAMES, Rendered, Scene, draw_scene, render, sample_scene
from xai_core.train_demo_models import HELD_OUT_SEED, Recipe, accuracy, draw_pictures, normalise, train

each_model = pytest.mark.parametrize("name", DEMO_MODELS)


@cache
def packaged(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True).eval()


def as_batch(pictures: list[Rendered]) -> tuple[Tensor, Tensor]:
    images = np.stack([picture.image for picture in pictures]).transpose(0, 3, 1, 2)
    return torch.from_numpy(images.copy()), torch.tensor([picture.label for picture in pictures])


@cache
def held_out() -> tuple[Tensor, Tensor]:
    return as_batch([render(HELD_OUT_SEED, index) for index in range(200)])


def without_first(scene: Scene, deciding: bool) -> Rendered:
    part = next(index for index, part in enumerate(scene.parts) if part.deciding == deciding)
    return draw_scene(scene, without=part)


@each_model
def test_weights_are_small_and_tell_where_they_come_from(name: str) -> None:
    assert weights_path(name).stat().st_size <= 2_000_000
    with safe_open(weights_path(name), framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["test_accuracy"]) >= 0.95
    assert metadata["command"].startswith("python -m xai_core.train_demo_models")
    assert metadata["seed"].isdigit()


@each_model
def test_timm_knows_the_models(name: str) -> None:
    assert timm.is_model(name)
    assert timm.is_model_pretrained(name)
    config = timm.data.resolve_model_data_config(packaged(name))
    assert config["input_size"] == (3, 128, 128)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bilinear")


@each_model
def test_pretrained_loads_the_packaged_weights(name: str) -> None:
    state = packaged(name).state_dict()
    with safe_open(weights_path(name), framework="pt") as file:
        assert set(file.keys()) == set(state)
        for key in file.keys():  # noqa: SIM118
            torch.testing.assert_close(file.get_tensor(key).to(state[key].dtype), state[key], rtol=0, atol=0)


def test_architectures_are_the_ordinary_ones() -> None:
    resnet, vit = (packaged(name) for name in DEMO_MODELS)
    assert type(resnet) is ResNet
    assert type(vit) is VisionTransformer
    assert vit.patch_embed.num_patches == 64
    assert vit.cls_token is not None


@each_model
def test_features_have_the_usual_shapes(name: str) -> None:
    model, images = packaged(name), normalise(held_out()[0][:2])
    with torch.inference_mode():
        features = model.forward_features(images)
        maps = timm.create_model(name, features_only=True)(images)
        logits = model.forward_head(features)
    assert features.shape == ((2, 128, 8, 8) if name.endswith("resnet") else (2, 65, 96))
    assert logits.shape == (2, len(CLASS_NAMES))
    assert maps[-1].shape[2:] == (8, 8)
    assert maps[-1].shape[1] == model.feature_info[-1]["num_chs"]


@each_model
def test_other_class_counts_keep_the_backbone(name: str) -> None:
    model = timm.create_model(name, pretrained=True, num_classes=4)
    assert model.get_classifier().out_features == 4
    for key, value in packaged(name).state_dict().items():
        if not key.startswith(("fc.", "head.")):
            torch.testing.assert_close(model.state_dict()[key], value)


@each_model
def test_accuracy_on_held_out_pictures(name: str) -> None:
    assert accuracy(packaged(name), *held_out()) >= 0.95


@each_model
@pytest.mark.parametrize(("deciding", "lowest"), [(False, 0.93), (True, 0.8)])
def test_accuracy_lasts_when_one_part_is_removed(name: str, deciding: bool, lowest: float) -> None:
    scenes = [sample_scene(HELD_OUT_SEED, index, part_dropout=0.0) for index in range(400, 520)]
    pictures = [without_first(scene, deciding) for scene in scenes]
    assert accuracy(packaged(name), *as_batch(pictures)) >= lowest


def test_training_is_reproducible() -> None:
    pictures = draw_pictures(seed=1, count=18)
    first, second = (train("vitrine_demo_vit", pictures, seed=5, recipe=Recipe(2, 1e-3)) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
