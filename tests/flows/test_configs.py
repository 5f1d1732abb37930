"""The configs of the repository: every training can be built, and every study can be run after its trainings."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from flows.config import load_config
from flows.preflight import check_study
from storage.store import open_store
from tasks.study import Study, describe_model
from tasks.training.stage import build, header
from tests.conftest import REPOSITORY
from xai_core.training import save_trained

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TRAININGS = sorted((REPOSITORY / "configs" / "training").glob("*.yaml"))
# Those whose files the others inherit from come first.
ORDER = sorted(TRAININGS, key=lambda path: not path.stem.startswith("ia-"))
AFTER = [path for path in CONFIGS if "trained/" in path.read_text()]
NAMED = re.compile(r"^ *[^#\n]*\btrained/([\w-]+)\.safetensors", re.MULTILINE)

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def checkout(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs as in a checkout with the data beside it, and files of all trainings, with random weights."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "shared").symlink_to(shared_data.parent)
    shutil.copytree(REPOSITORY / "configs", root / "vitrine" / "configs")
    (root / "vitrine" / "trained").mkdir()
    store = open_store(root / "store", create=True)
    for original in ORDER:
        path = root / "vitrine" / "configs" / "training" / original.name
        config = load_config(path)
        training = config.training
        assert training is not None
        for seed in (0, 1, 2):
            seeded = training.model_copy(update={"recipe": dataclasses.replace(training.recipe, seed=seed)})
            model, objective = build(seeded, config.model, "cpu")
            about = header(seeded, model, describe_model(config.model, store))
            name = f"{original.stem}{f'-{seed}' if seed else ''}"
            save_trained(root / "vitrine" / "trained" / f"{name}.safetensors", objective.trained, about)
            if training.kind.name != "ia":
                break
    return root


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_a_training_can_begin(checkout: Path, path: Path) -> None:
    config = load_config(checkout / "vitrine" / "configs" / "training" / path.name, ["methods=[]", "metrics=[]"])
    check_study(Study(config, open_store(checkout / "store")))


@pytest.mark.parametrize("path", AFTER, ids=lambda path: path.stem)
def test_a_study_can_be_run_after_the_trainings_that_it_names(checkout: Path, path: Path) -> None:
    named = set(NAMED.findall(path.read_text()))
    assert named
    for name in named:
        assert f"-o trained/{name}.safetensors" in path.read_text(), "the command that makes it"
    config = load_config(checkout / "vitrine" / "configs" / path.name)
    check_study(Study(config, open_store(checkout / "store")))
