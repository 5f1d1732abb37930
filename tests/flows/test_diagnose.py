"""``vitrine diagnose`` and ``vitrine train`` as they are typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.conftest import TINY, Ran, config_with
from tests.flows.command import vitrine
from xai_core.synthetic import render

STUDY = config_with(
    TINY,
    methods=["grad_cam"],
    metrics=[],
    concepts={"layers": ["blocks.1", "blocks.2"], "per_image": 4, "receptive_fields": None},
)


@pytest.fixture(scope="module")
def place(run_chain: Callable[[dict[str, Any], Path], Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that has dictionaries, and a picture."""
    folder = tmp_path_factory.mktemp("diagnose")
    run_chain(STUDY, folder / "vitrine-store")
    Image.fromarray(render(1, 30).image).save(folder / "toy.png")
    return folder


def test_a_picture_is_diagnosed_by_a_runs_dictionaries(place: Path) -> None:
    found = vitrine("diagnose", "toy.png", "--classes", "0,rolling bird", "--attack", "4", cwd=place)
    assert found.returncode == 0, found.stderr[-2000:]
    page, *lines = found.stdout.splitlines()
    assert page == "diagnosis.html"
    assert (place / page).read_text().startswith("<!doctype html>")
    assert any(line.strip().startswith("rolling bird: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("toy.png", "--classes", "0,rolling brid"), "--classes: expected a class of vitrine_demo_vit"),
        (("toy.png", "--classes", "1,1"), "--classes: expected different classes"),
        (("toy.png", "--classes", "0,1", "--towards", "2"), "--towards: nothing reads it without --attack"),
        (("none.png", "--classes", "0,1"), "none.png: expected a picture"),
        (("toy.png", "--classes", "0,1", "--extractor", "sae"), "--extractor: expected one of run"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(place: Path, arguments: tuple[str, ...], told: str) -> None:
    found = vitrine("diagnose", *arguments, "-o", "refused.html", cwd=place)
    assert found.returncode == 2
    assert told in found.stderr
    assert not (place / "refused.html").exists()


def test_training_writes_weights_or_says_what_is_wrong(tmp_path: Path) -> None:
    config = {
        "dataset": {"kind": "demo", "images": 24},
        "test": {"kind": "demo", "images": 8, "seed": 2},
        "model": {
            "name": "resnet18",
            "pretrained": False,
            "create_args": {"num_classes": 9, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
            "transform": {"input_size": [3, 32, 32]},
        },
        "training": {"epochs": 1, "batch_size": 8},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    found = vitrine("train", "classifier", "train.yaml", "-o", "small.safetensors", cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "accuracy on the test pictures" in found.stdout
    assert (tmp_path / "small.safetensors").is_file()
    refused = vitrine("train", "classifier", "train.yaml", "--set", "training.epoch=2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "training.epoch" in refused.stderr
