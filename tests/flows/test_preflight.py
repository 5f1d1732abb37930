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


def told(truth: dict[str, Any], masked: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The folder of one picture, with a metric that reads masks."""
    dataset = {**masked["dataset"], "masks": None}
    return {"dataset": dataset, "truth": truth, "metrics": ["insertion", "pointing_game"], **changes}


def test_a_metric_that_needs_a_mask_is_refused_on_data_without(check: Check, masked: dict[str, Any]) -> None:
    with pytest.raises(
        UsageError,
        match=r"metrics\.1: metric 'pointing_game' needs .+: set truth\.masks .+ truth\.boxes .+ dataset\.kind",
    ):
        check(**told({}, masked))


def test_a_metric_that_needs_true_effects_is_refused_on_data_that_was_not_drawn(
    check: Check, masked: dict[str, Any], tmp_path: Path
) -> None:
    metrics = {"metrics": ["insertion", "true_effect_rank"]}
    for truth in ({}, {"masks": str(tmp_path / "masks")}):
        with pytest.raises(
            UsageError,
            match=r"metrics\.1: metric 'true_effect_rank' needs the true effects .+ set dataset\.kind to demo",
        ):
            check(**told(truth, masked, **metrics))


def test_the_demo_needs_nothing(check: Check) -> None:
    check(metrics=["pointing_game", "true_effect_rank"])


def test_masks_that_say_something_are_taken(check: Check, masked: dict[str, Any], tmp_path: Path) -> None:
    masks = str(tmp_path / "masks")
    for truth in ({"masks": masks}, {"masks": masks, "foreground": {"rolling cat": [1], 3: [7]}, "ignore": [9]}):
        check(**told(truth, masked))
    # What no metric reads is not looked at.
    check(**told({"masks": "nowhere"}, masked, metrics=["insertion"]))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"masks": "nowhere"}, r"truth\.masks: expected a folder that mirrors dataset\.path, got .*nowhere"),
        (
            {"foreground": [3, 7], "ignore": [9]},
            r"truth\.foreground: expected values \[3, 7\] in the masks, the first 100 of which hold 1: name those",
        ),
        ({"ignore": [1]}, r"truth\.foreground: expected a value on the object in the masks, .+ which hold 1"),
        (
            {"foreground": {"rolling cta": [1]}},
            r"truth\.foreground: .+ 9 classes, got 'rolling cta': did you mean",
        ),
        (
            {"foreground": {9: [1]}},
            r"truth\.foreground: expected names or numbers of the model's 9 classes, got '9'",
        ),
        ({"foreground": {0: [1], "rolling cat": [1]}}, r"truth\.foreground: expected each class once"),
    ],
)
def test_masks_that_say_nothing_are_refused(
    truth: dict[str, Any], message: str, check: Check, masked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        check(**told({"masks": str(tmp_path / "masks"), **truth}, masked))


def test_a_mask_of_truth_that_does_not_fit_is_refused(
    check: Check, masked: dict[str, Any], tmp_path: Path
) -> None:
    mask = tmp_path / "masks" / "a" / "turned.png"
    study = told({"masks": str(tmp_path / "masks")}, masked)
    for values, message in [
        (np.ones((24, 40), np.uint8), r"truth\.masks: expected .+ of size 24 x 40 like its image, got 40 x 24"),
        (
            np.ones((40, 24, 3), np.uint8),
            r"truth\.masks: expected .+ with one byte a pixel .+ got mode RGB: convert",
        ),
        (
            np.ones((40, 24), np.uint16),
            r"truth\.masks: expected .+ with one byte a pixel .+ got mode I;16: convert",
        ),
    ]:
        Image.fromarray(values).save(mask)
        with pytest.raises(UsageError, match=message):
            check(**study)
    mask.write_bytes(b"no mask")
    with pytest.raises(UsageError, match=r"truth\.masks: expected a mask at .+turned\.png"):
        check(**study)
    mask.unlink()
    with pytest.raises(UsageError, match=r"truth\.masks: expected a mask for every image, got none at"):
        check(**study)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a/turned.jpg,0,0,24,40,", None),
        ("a/turned.jpg,0,0,24,40,rolling cat\nx/y.jpg,0,0,1,1,who", None),
        (
            "a/turned.jpg,0,0,24,40,rolling cta",
            r"truth\.boxes: .+ 9 classes as labels .+ 'rolling cta': did you mean",
        ),
        (
            "turned.jpg,0,0,24,40,",
            r"truth\.boxes: expected paths .+ such as 'a/turned\.jpg', .+ got 'turned\.jpg'",
        ),
        (
            "a/turned.jpg,24,0,30,40,",
            r"truth\.boxes: a/turned\.jpg: expected boxes .+ of 24 x 40, got 24, 0 to 30, 40",
        ),
        ("a/turned.jpg,4,0,3,40,", r"truth\.boxes: expected numbers x0 < x1 and y0 < y1 in line 2"),
        ("", r"truth\.boxes: expected paths of the set's images, .+ got None"),
    ],
)
def test_boxes_are_refused_where_they_fit_nothing(
    rows: str, message: str | None, check: Check, masked: dict[str, Any], tmp_path: Path
) -> None:
    """The picture is 24 x 40 once it stands upright."""
    path = tmp_path / "boxes.csv"
    path.write_text(f"path,x0,y0,x1,y1,label\n{rows}")
    study = told({"boxes": str(path)}, masked)
    if message is None:
        check(**study)
        return
    with pytest.raises(UsageError, match=message):
        check(**study)


def test_a_table_of_boxes_that_is_not_there_is_refused(check: Check, masked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"truth\.boxes: expected a CSV file at nowhere\.csv"):
        check(**told({"boxes": "nowhere.csv"}, masked))
