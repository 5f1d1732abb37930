"""Arguments of timm that speak of weights: which of them make another network, and files that are never read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.xai_core.inherent.small import PA, built
from xai_core.create_args import that_build, weight_files, without_paths
from xai_core.errors import UsageError
from xai_core.inherent.checkpoint import create_args
from xai_core.models import ModelSpec, load_classifier, weights_digest
from xai_core.training import save_trained

GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
ARGUMENTS: dict[str, Any] = {
    "num_classes": 3,
    "cache_dir": "downloads",
    "checkpoint_path": "first.safetensors",
    "backbone_args": {"channels": [4, 4], "pretrained_cfg_overlay": {"file": "second.safetensors", **GREY}},
    "pretrained_cfg_overlay": {"file": "third.safetensors"},
}


def test_every_file_is_found_with_the_key_that_names_it() -> None:
    assert dict(weight_files(ARGUMENTS)) == {
        "checkpoint_path": "first.safetensors",
        "backbone_args.pretrained_cfg_overlay.file": "second.safetensors",
        "pretrained_cfg_overlay.file": "third.safetensors",
    }
    assert not dict(weight_files(without_paths(ARGUMENTS)))


def test_paths_go_and_what_prepares_pictures_stays() -> None:
    inside = {"channels": [4, 4], "pretrained_cfg_overlay": GREY}
    assert without_paths(ARGUMENTS) == {"num_classes": 3, "backbone_args": inside}
    assert that_build(ARGUMENTS) == {"num_classes": 3, "backbone_args": {"channels": [4, 4]}}


def test_a_pixel_architecture_is_built_again_with_its_backbones_normalisation() -> None:
    backbone_args = {**PA["backbone_args"], "pretrained_cfg_overlay": GREY}
    model = built("pa", threshold=0.5, backbone_args=backbone_args)
    again = load_classifier(ModelSpec("vitrine_pa", False, create_args=create_args(model, model.module.config)))
    assert again.data_config["mean"] == model.data_config["mean"] == GREY["mean"]
    for name in ("renormalise_scale", "renormalise_shift"):
        torch.testing.assert_close(again.module.get_buffer(name), model.module.get_buffer(name))


SMALL = {"num_classes": 3, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
NAMED = {
    "overlay": lambda path: {"pretrained_cfg_overlay": {"file": path, "num_classes": 3}},
    "checkpoint": lambda path: {"checkpoint_path": path},
}


@pytest.mark.parametrize("name", NAMED)
def test_weights_are_read_from_safetensors_alone(name: str, tmp_path: Path) -> None:
    module = timm.create_model("resnet18", **SMALL)
    safe, pickle = tmp_path / "weights.safetensors", tmp_path / "weights.pth"
    save_file(module.state_dict(), safe)
    shutil.copy(safe, pickle)
    loaded = load_classifier(
        ModelSpec("resnet18", name == "overlay", create_args={**SMALL, **NAMED[name](str(safe))})
    )
    assert weights_digest(loaded.module) == weights_digest(module)
    with pytest.raises(
        UsageError, match=r"model\.create_args\..*: expected a \.safetensors file, got .*weights\.pth"
    ):
        load_classifier(ModelSpec("resnet18", create_args={**SMALL, **NAMED[name](str(pickle))}))
    (tmp_path / "renamed.safetensors").write_bytes(b"a pickle")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for wrong in ("none", "renamed", "other"):
        path = str(tmp_path / f"{wrong}.safetensors")
        with pytest.raises(UsageError, match=rf"expected safetensors with weights of resnet18 in .*{wrong}"):
            load_classifier(ModelSpec("resnet18", name == "overlay", create_args={**SMALL, **NAMED[name](path)}))


def test_a_pickle_that_a_checkpoints_header_names_is_not_read(tmp_path: Path) -> None:
    module, path = timm.create_model("resnet18", **SMALL), tmp_path / "shared.safetensors"
    config = {"name": "resnet18", "create_args": {**SMALL, "checkpoint_path": str(tmp_path / "beside.pth")}}
    save_trained(path, module, {"kind": "classifier", "config": config, "model": {}, "weights": None})
    with pytest.raises(UsageError, match=r"model\.create_args\.checkpoint_path: expected a \.safetensors file"):
        load_classifier(ModelSpec("resnet18", checkpoint=str(path)))


def test_a_folder_of_weights_is_no_name_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.name: expected a timm architecture, got 'local-dir:"):
        load_classifier(ModelSpec(f"local-dir:{tmp_path}"))
