"""Training a classifier of one's own: it learns, the same twice over, and refuses what it cannot learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from storage.canonical import digest_file
from tasks.config import ModelConfig
from tasks.train_classifier import ClassifierTraining, Trained, run_training
from xai_core.errors import UsageError
from xai_core.models import load_classifier

MODEL = {
    "name": "resnet18",
    "pretrained": False,
    "create_args": {"num_classes": 3, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "transform": {"input_size": [3, 32, 32], "crop_pct": 1.0},
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours with noise, which a few steps tell apart."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for index in range(24):
            pixels = generator.integers(0, 80, (40, 48, 3))
            pixels[..., label] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def trained(
    folder: Path,
    output: Path,
    model: dict[str, Any] = MODEL,
    dataset: dict[str, Any] | None = None,
    **training: Any,
) -> Trained:
    whole = {"kind": "folder", "path": str(folder)}
    data = {**whole, **(dataset or {})}
    recipe = {"epochs": 6, "batch_size": 12, "learning_rate": 0.01, **training}
    config = ClassifierTraining.model_validate(
        {"dataset": data, "test": whole, "model": model, "training": recipe}
    )
    return run_training(config, output, "cpu", lambda *_: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_a_study_can_name_the_weights(colours: Path, tmp_path: Path, precision: str) -> None:
    found = trained(colours, tmp_path / "weights.safetensors", precision=precision)
    assert found.test_accuracy == 1.0
    model = load_classifier(ModelConfig(**{**MODEL, "checkpoint": str(found.path)}).spec())
    assert model.num_classes == 3


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(colours: Path, tmp_path: Path) -> None:
    digests = [
        digest_file(trained(colours, tmp_path / f"{run}.safetensors", epochs=1, seed=seed).path)
        for run, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_limit_takes_every_class_and_the_own_order_of_a_source_the_first(colours: Path, tmp_path: Path) -> None:
    some = {"limit": 24}
    assert trained(colours, tmp_path / "some.safetensors", dataset=some, epochs=20).test_accuracy == 1.0
    first = {**some, "order_seed": None}
    assert trained(colours, tmp_path / "first.safetensors", dataset=first, epochs=20).test_accuracy < 0.5


def test_training_starts_from_the_models_weights(colours: Path, tmp_path: Path) -> None:
    first = trained(colours, tmp_path / "first.safetensors", epochs=1).path
    model = {**MODEL, "checkpoint": str(first)}
    again = trained(colours, tmp_path / "again.safetensors", model, epochs=1, learning_rate=1e-12).path
    before, after = load_file(first), load_file(again)
    assert all(before[name].allclose(after[name], atol=1e-6) for name in before if name.endswith("conv1.weight"))


def test_labels_without_a_logit_are_refused(colours: Path, tmp_path: Path) -> None:
    small = {**MODEL, "create_args": {**MODEL["create_args"], "num_classes": 2}}
    with pytest.raises(UsageError, match=r"labels from 0 to 1, got 2 .*num_classes"):
        trained(colours, tmp_path / "weights.safetensors", small)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_training(colours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a finite loss, got nan in epoch 1 of 6; lower learning_rate"):
        trained(colours, tmp_path / "weights.safetensors", learning_rate=1e30)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"epochs": 0}, "epochs and batch_size of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(
    colours: Path, tmp_path: Path, training: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        trained(colours, tmp_path / "weights.safetensors", **training)
