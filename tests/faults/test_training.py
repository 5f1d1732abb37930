"""SIGKILL in a training: the same command again ends in the same weights as one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from storage.canonical import digest_file
from storage.commits import CommitRecord
from storage.store import Store, open_store
from tests.conftest import TINY_IA
from tests.faults.processes import Clean, Faults, Warm, digest, temporary

STUDY: dict[str, Any] = {
    "name": "training",
    "dataset": {"kind": "demo", "images": 40},
    "model": {
        "name": "resnet18",
        "pretrained": False,
        "create_args": {
            "num_classes": 12,
            "layers": [1, 1, 1, 1],
            "channels": [8, 8, 16, 16],
            "drop_rate": 0.2,
        },
        "transform": {"input_size": [3, 32, 32]},
    },
    "methods": [],
    "metrics": [],
    "training": {"kind": "classifier", "recipe": {"epochs": 4, "batch_size": 8}, "held_out": 0.2},
    "run": {"shard_size": 16},
}
#: The same for what else is trained: an explainer of a frozen model, and a model that weighs its patches.
STUDIES: dict[str, dict[str, Any]] = {
    "classifier": STUDY,
    "aha": {
        **STUDY,
        "dataset": {"kind": "demo", "images": 24},
        "model": {"name": "vitrine_demo_vit"},
        "training": {
            "kind": {"name": "aha", "steps": 3},
            "recipe": {"epochs": 3, "batch_size": 4, "shift": 0},
            "held_out": 0.2,
        },
    },
    "ia": {
        **STUDY,
        "model": TINY_IA,
        "training": {
            "kind": {"name": "ia"},
            "recipe": {"epochs": 4, "batch_size": 8, "shift": 0},
            "held_out": 0.2,
        },
    },
}
KILLS = 5


def trained(store: Store) -> CommitRecord:
    (record,) = [one for _, one in store.records() if one.unit.stage == "train"]
    return record


def weights(root: Path) -> str:
    store = open_store(root)
    return digest_file(store.read_file(trained(store), "trained"))


@pytest.fixture(scope="module", params=STUDIES)
def clean(warm: Warm, request: pytest.FixtureRequest) -> tuple[dict[str, Any], Clean]:
    study = STUDIES[request.param]
    return study, warm.clean(study)


CHECKPOINT, RESULT = r"store/work/[^.]*\.checkpoint$", r"/files/train/"
# Where it is killed, and the step that it goes on from then.
MOMENTS = {("settle", CHECKPOINT): 5, ("rename", CHECKPOINT): 0, ("rename", RESULT): 5}


@pytest.mark.parametrize(("moment", "path"), MOMENTS)
def test_a_training_that_is_killed_ends_in_the_same_weights(
    warm: Warm, clean: tuple[dict[str, Any], Clean], tmp_path: Path, moment: str, path: str
) -> None:
    study, unhurt = clean
    root, step = tmp_path / "store", MOMENTS[moment, path]
    faults = Faults(tmp_path, ({"moment": moment, "path": path},))
    assert warm.run(study, root, faults) == -signal.SIGKILL, warm.said()
    assert len(faults.fired()) == 1
    assert bool(list((root / "work").glob(".tmp-*pictures"))) == (path == CHECKPOINT)
    assert warm.run(study, root, Faults(tmp_path)) == 0, warm.said()
    assert digest(root) == unhurt.digest
    assert weights(root) == weights(unhurt.store.root)
    begun = trained(open_store(root)).facts["resumed_at"]
    assert begun == step or (path == RESULT and begun > step)
    assert temporary(root) == []
    assert not (root / "work").exists()


def test_a_training_that_is_killed_at_random_times_ends_in_the_same_weights(warm: Warm, tmp_path: Path) -> None:
    clean = warm.clean(STUDY)
    chance, root, kills = random.Random(3), tmp_path / "store", 0
    while kills < KILLS:
        child = warm.start(STUDY, root, Faults(tmp_path))
        time.sleep(chance.uniform(0.3, 1.0) * clean.seconds)
        os.kill(child, signal.SIGKILL)
        if warm.wait(child) == 0:
            break
        kills += 1
    assert warm.run(STUDY, root, Faults(tmp_path)) == 0, warm.said()
    assert digest(root) == clean.digest
    assert weights(root) == weights(clean.store.root)
