"""What is refused before any work, and what is not to blame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flows.preflight import check_study
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.study import Study
from tests.conftest import TINY, config_with, picture
from xai_core.errors import UsageError

Check = Callable[..., None]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks the tiny study with some changes."""

    def check(**changes: Any) -> None:
        config = StudyConfig.model_validate(config_with(TINY, **changes))
        check_study(Study(config, open_store(tmp_path / "store", create=True)))

    return check


@pytest.fixture
def masked(tmp_path: Path) -> dict[str, Any]:
    """A folder of one picture that is stored lying on its side, with an upright mask."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, width=40, height=24).save(tmp_path / "images" / "a" / "turned.jpg", exif=exif)
    Image.fromarray(np.ones((40, 24), np.uint8)).save(tmp_path / "masks" / "a" / "turned.png")
    dataset = {"kind": "folder", "path": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), "images": 1}
    return {"dataset": dataset, "parts": {"parser": "masks"}}


def test_a_mask_is_compared_with_the_upright_picture(check: Check, masked: dict[str, Any]) -> None:
    check(**masked)


def test_a_mask_that_lies_on_its_side_is_refused(check: Check, masked: dict[str, Any], tmp_path: Path) -> None:
    Image.fromarray(np.ones((24, 40), np.uint8)).save(tmp_path / "masks" / "a" / "turned.png")
    with pytest.raises(
        UsageError, match=r"dataset\.masks: expected .+ of size 24 x 40 like its image, got 40 x 24"
    ):
        check(**masked)


def test_a_missing_and_a_broken_mask_are_refused(check: Check, masked: dict[str, Any], tmp_path: Path) -> None:
    mask = tmp_path / "masks" / "a" / "turned.png"
    mask.write_bytes(b"no mask")
    with pytest.raises(UsageError, match=r"dataset\.masks: expected a mask at .+turned\.png"):
        check(**masked)
    mask.unlink()
    with pytest.raises(UsageError, match=r"dataset\.masks: expected a mask for every image, got none at"):
        check(**masked)


def test_a_broken_picture_is_left_to_the_manifest(check: Check, masked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images" / "a" / "turned.jpg").write_bytes(b"broken")
    check(**masked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(check: Check) -> None:
    with pytest.raises(UsageError, match=r"run\.device: expected a CUDA device, found none"):
        check(run={"device": "cuda"})


def test_a_gpus_arithmetic_on_the_cpu_is_refused(check: Check) -> None:
    with pytest.raises(UsageError, match=r"run\.precision: tf32"):
        check(run={"device": "cpu", "precision": "tf32"})


def test_a_backbone_that_cannot_be_built_is_refused_by_its_key(check: Check) -> None:
    with pytest.raises(UsageError, match=r"unknown timm model 'vitrine_demo_vti'"):
        check(parts={"backbone": {"name": "vitrine_demo_vti"}})


def test_a_method_that_the_network_does_not_fit_is_refused_with_those_that_fit(check: Check) -> None:
    with pytest.raises(
        UsageError, match=r"methods\.1: method 'attention_rollout' does not fit .*_resnet"
    ) as refusal:
        check(
            model={"name": "vitrine_demo_resnet"},
            methods=["grad_cam", "attention_rollout"],
            concepts={"layers": []},
        )
    assert "it fits vit models, and this is a cnn" in str(refusal.value)
    assert "methods that fit it: ablation_cam, " in str(refusal.value)
    assert "token_tm" not in str(refusal.value)


def test_a_layer_without_places_is_refused_with_one_to_use(check: Check) -> None:
    with pytest.raises(UsageError, match=r"methods\.0: .*layer 'head'.*spatial positions"):
        check(methods=[{"name": "layer_cam", "layer": "head"}])


def test_a_method_that_needs_precision_is_refused_under_bf16(check: Check) -> None:
    with pytest.raises(UsageError, match=r"methods\.0: method 'lrp_epsilon' needs more than bf16's"):
        check(
            model={"name": "vitrine_demo_resnet"},
            methods=["lrp_epsilon"],
            concepts={"layers": []},
            run={"precision": "bf16"},
        )
