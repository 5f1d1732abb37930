"""What trainings of explainers and of models with a backbone leave, and what keys and headers say of files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from storage.store import open_store
from tasks.checkpoint import Checkpoint
from tasks.config import ModelConfig, StudyConfig
from tasks.sources import open_source, read_listed
from tasks.study import describe_model
from tasks.training.stage import last_good
from tasks.worker import classifier
from tests.conftest import Ran
from tests.xai_core.training.tiny import training
from xai_core.attribution import attribute
from xai_core.errors import UsageError
from xai_core.registry import methods
from xai_core.training import digest_of, model_digest, read_trained

Chain = Callable[[dict[str, Any], Path], Ran]
SIZE = 32
BACKBONE = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 12}


def trained(ran: Ran) -> Path:
    (record,) = [one for _, one in ran.store.records([ran.run_id]) if one.unit.stage == "train"]
    return ran.store.read_file(record, "trained")


# --- an explainer through the whole chain ---------------------------------------------------------------------


AHA: dict[str, Any] = {
    "name": "aha",
    "dataset": {"kind": "demo", "images": 20},
    "model": "vitrine_demo_vit",
    "methods": [],
    "metrics": [],
    "training": {
        "kind": {"name": "aha", "steps": 3},
        "recipe": {"epochs": 1, "batch_size": 4, "shift": 0},
        "held_out": 0.2,
        "test": {"kind": "demo", "images": 4, "seed": 2},
    },
}


@pytest.fixture(scope="module")
def explainer(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(AHA, tmp_path_factory.mktemp("aha") / "store")


def test_an_explainer_trained_twice_is_the_same_file(explainer: Ran, run_chain: Chain, tmp_path: Path) -> None:
    again = run_chain(AHA, tmp_path / "store")
    assert digest_of(trained(again)) == digest_of(trained(explainer))
    rows = explainer.sql("select split, name from training where name = 'score' order by split")
    assert rows == [{"split": "held_out", "name": "score"}, {"split": "test", "name": "score"}]


def test_its_file_says_whose_explainer_it_is_and_explains_that_model(
    explainer: Ran, run_chain: Chain, tmp_path: Path
) -> None:
    model = classifier(ModelConfig().model_dump_json(), "cpu")
    _, about = read_trained(trained(explainer), kinds=("aha",))
    assert about["weights"] == model_digest(model)
    assert str(explainer.store.root) not in json.dumps(about)
    method = {"name": "aha", "checkpoint": str(trained(explainer))}
    study = {**AHA, "training": None, "methods": [method], "metrics": ["deletion"], "run": {"shard_size": 4}}
    ran = run_chain({**study, "dataset": {"kind": "demo", "images": 4}}, tmp_path / "study")
    stored, expected = explained(ran, method)
    assert torch.allclose(stored, expected, atol=2e-3 * float(expected.abs().max()))
    assert ran.sql("select count(*) as n from metrics") == [{"n": 4}]


def explained(ran: Ran, method: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of a study of the demo's pictures, and the same by one call of the method."""
    records = {one.unit.stage: one for _, one in ran.store.records([ran.run_id])}
    record, config = records["attribute"], StudyConfig.model_validate({**AHA, "methods": [method]})
    scale = torch.from_numpy(ran.store.read_array(record, "scale")).view(-1, 1, 1)
    model, source = classifier(config.model.model_dump_json(), "cpu"), open_source(config.dataset)
    rows = ran.store.read_table(records["manifest"], "manifest").to_pylist()
    inputs = torch.stack([model.preprocess(read_listed(source, row["path"], row["sha256"])) for row in rows])
    with torch.no_grad():
        targets = model(inputs).argmax(dim=1)
    options = methods.get("aha").options(checkpoint=method["checkpoint"])
    maps = attribute(model, inputs, targets, method="aha", options=options, native=True)
    return torch.from_numpy(ran.store.read_array(record, "maps")).float() * scale, maps


# --- files of first weights -----------------------------------------------------------------------------------


def backbone(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("resnet18", **BACKBONE).state_dict(), path)
    return path


def pixel(file: Path) -> dict[str, Any]:
    """A PA(8, 0) whose backbone begins with the weights of a file."""
    overlay = {"pretrained_cfg_overlay": {"file": str(file), "num_classes": 12}}
    arguments = {name: value for name, value in BACKBONE.items() if name != "num_classes"}
    return {
        "name": "vitrine_pa",
        "pretrained": True,
        "create_args": {
            "num_classes": 12,
            "img_size": SIZE,
            "patch_size": 8,
            "backbone": "resnet18",
            "backbone_args": {**arguments, **overlay},
        },
    }


def of_pixels(file: Path) -> dict[str, Any]:
    recipe = {"epochs": 1, "batch_size": 4}
    return {**AHA, "name": "pa", "model": pixel(file), "training": {"kind": "pa", "recipe": recipe, "held_out": 0}}


def test_where_first_weights_lay_is_in_neither_key_nor_file(run_chain: Chain, tmp_path: Path) -> None:
    first = backbone(tmp_path / "weights.safetensors", 0)
    ran = run_chain(of_pixels(first), tmp_path / "store")
    assert str(tmp_path) not in json.dumps(read_trained(trained(ran))[1])
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(first, tmp_path / "elsewhere" / "again.safetensors")
    again = run_chain(of_pixels(Path(moved)), tmp_path / "store")
    assert trained(again) == trained(ran)
    assert again.counts.get("train") is None


def test_other_weights_in_the_same_file_are_another_model(tmp_path: Path) -> None:
    store, path = open_store(tmp_path / "store", create=True), backbone(tmp_path / "weights.safetensors", 0)
    config = ModelConfig.model_validate(pixel(path))

    def known() -> tuple[str, str]:
        return describe_model(config, store)["weights"], model_digest(classifier(config.model_dump_json(), "cpu"))

    before = known()
    assert known() == before
    time = path.stat().st_mtime_ns
    os.utime(backbone(path, 1), ns=(time + 10**9, time + 10**9))
    assert [one != two for one, two in zip(known(), before, strict=True)] == [True, True]


# --- numbers that are none ------------------------------------------------------------------------------------


def test_a_weight_that_is_none_is_told_with_the_checkpoint_before_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(open_store(tmp_path / "store", create=True), "ab" * 32)
    run = training()
    run.advance(2)
    checkpoint.write(run.state())
    run.advance(2)
    next(run._objective.trained.parameters()).data.fill_(torch.nan)
    with pytest.raises(UsageError, match=r"a finite weight.*of step 2") as raised, last_good(checkpoint):
        run.state()
    assert str(checkpoint.path) in str(raised.value)
    assert "--set training.recipe.learning_rate=" in str(raised.value)
