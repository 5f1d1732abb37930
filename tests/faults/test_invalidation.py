"""Every ingredient of a key changed in turn: what reruns is exactly what depends on it, counted by executions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from storage.store import open_store
from tasks.config import StudyConfig
from tasks.pipeline import STAGES
from tasks.plan import Planner
from tasks.sources import open_source
from tasks.study import Study
from tests.conftest import TINY, Ran, config_with, write_folder
from xai_core.demo_models import weights_path

Chain = Callable[[dict[str, Any], Path], Ran]
Change = Callable[[Path], dict[str, Any]]

# Eight pictures in two shards with masks, one pixel method, one part method, one layer.
CONFIG = config_with(
    TINY,
    dataset={"kind": "folder", "images": 1},
    model={"name": "vitrine_demo_vit"},
    parts={"parser": "masks", "k": 4},
    methods=[{"name": "integrated_gradients", "steps": 2}, "kl_hessian"],
    metrics=["p_deletion"],
)
ALL = {
    "manifest": 2,
    "predict": 2,
    "parts": 2,
    "pfv": 2,
    "dictionary": 1,
    "exemplars": 1,
    "attribute": 4,
    "metrics": 4,
    "report": 1,
}
AFTER_PARTS = {"parts": 2, "attribute": 2, "metrics": 4, "report": 1}
AFTER_PREDICT = {
    "predict": 2,
    "pfv": 2,
    "dictionary": 1,
    "exemplars": 1,
    "attribute": 4,
    "metrics": 4,
    "report": 1,
}
BUT_MANIFEST = {stage: count for stage, count in ALL.items() if stage != "manifest"}
ONE_SHARD = {stage: count // 2 if count > 1 else count for stage, count in ALL.items()}


def with_config(**changes: Any) -> Change:
    """A change of the config alone."""
    return lambda _: changes


def touch(root: Path) -> dict[str, Any]:
    os.utime(root / "images" / "a" / "000.png", (1, 1))
    return {}


def repaint(root: Path) -> dict[str, Any]:
    path = root / "images" / "a" / "000.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    return {}


def repaint_a_mask(root: Path) -> dict[str, Any]:
    path = root / "masks" / "a" / "000.png"
    Image.fromarray(np.asarray(Image.open(path)).T.copy().reshape(32, 40)).save(path)
    return {}


def move(root: Path) -> dict[str, Any]:
    (root / "images").rename(root / "moved")
    return {"dataset": {"path": str(root / "moved")}}


def other_weights(root: Path) -> dict[str, Any]:
    weights = load_file(weights_path("vitrine_demo_vit"))
    save_file({name: tensor + 0.001 for name, tensor in weights.items()}, root / "w.safetensors")
    return {"model": {"checkpoint": str(root / "w.safetensors")}}


def the_same_weights_elsewhere(root: Path) -> dict[str, Any]:
    shutil.copyfile(weights_path("vitrine_demo_vit"), root / "first.safetensors")
    return {"model": {"checkpoint": str(root / "first.safetensors")}}


MATRIX: dict[str, tuple[Change, dict[str, int]]] = {
    "nothing": (with_config(), {}),
    "dataset.path": (move, {"manifest": 2, "report": 1}),
    "dataset.limit": (with_config(dataset={"limit": 4}), {"dictionary": 1, "exemplars": 1, "report": 1}),
    "dataset.order_seed": (with_config(dataset={"order_seed": 7}), ALL),
    "time of an image": (touch, {"manifest": 1, "report": 1}),
    "pixels of an image": (repaint, ONE_SHARD),
    "pixels of a mask": (repaint_a_mask, AFTER_PARTS),
    "model.name": (
        with_config(model={"name": "vitrine_demo_resnet"}, concepts={"layers": ["layer1"]}),
        BUT_MANIFEST,
    ),
    "model weights": (other_weights, BUT_MANIFEST),
    "model.create_args": (with_config(model={"create_args": {"drop_rate": 0.1}}), BUT_MANIFEST),
    "model.transform": (with_config(model={"transform": {"crop_pct": 0.9}}), BUT_MANIFEST),
    "target": (with_config(target="label"), AFTER_PREDICT),
    "parts.parser": (with_config(parts={"parser": "grid"}), AFTER_PARTS),
    "parts.k": (with_config(parts={"k": 3}), AFTER_PARTS),
    "parts.min_area": (with_config(parts={"min_area": 0.01}), AFTER_PARTS),
    "parts.backbone": (
        with_config(parts={"parser": "tokens", "backbone": {"name": "vitrine_demo_vit"}}),
        AFTER_PARTS,
    ),
    "a method's option": (
        with_config(methods=[{"name": "integrated_gradients", "steps": 3}, "kl_hessian"]),
        {"attribute": 2, "metrics": 2, "report": 1},
    ),
    "a method more": (
        with_config(methods=[*CONFIG["methods"], "grad_cam"]),
        {"attribute": 2, "metrics": 2, "report": 1},
    ),
    "a method fewer": (with_config(methods=["kl_hessian"]), {"report": 1}),
    "a metric more": (with_config(metrics=["p_deletion", "p_insertion"]), {"metrics": 4, "report": 1}),
    "a metric's option": (
        with_config(metrics=[{"name": "p_deletion", "baseline": "black"}]),
        {"metrics": 4, "report": 1},
    ),
    "concepts.layers": (
        with_config(concepts={"layers": ["blocks.1"]}),
        {"pfv": 2, "dictionary": 1, "exemplars": 1, "report": 1},
    ),
    "concepts.per_image": (
        with_config(concepts={"per_image": 2}),
        {"pfv": 2, "dictionary": 1, "exemplars": 1, "report": 1},
    ),
    "concepts.class_token": (
        with_config(concepts={"class_token": False}),
        {"pfv": 2, "dictionary": 1, "exemplars": 1, "report": 1},
    ),
    "concepts.receptive_fields": (
        with_config(concepts={"receptive_fields": None}),
        {"pfv": 2, "dictionary": 1, "exemplars": 1, "report": 1},
    ),
    "concepts.exemplars": (with_config(concepts={"exemplars": {"count": 2}}), {"exemplars": 1, "report": 1}),
    "concepts.graph": (
        with_config(concepts={"graph": {"images": 2, "concepts": 2}}),
        {"concept_graph": 2, "report": 1},
    ),
    # No autoencoder, no latents: only the page tells of it.
    "concepts.cafe": (with_config(concepts={"cafe": {"latents": 2}}), {"report": 1}),
    "concepts.atoms": (with_config(concepts={"atoms": 2}), {"dictionary": 1, "exemplars": 1, "report": 1}),
    "an extractor more": (
        with_config(concepts={"extractors": ["bisecting_kmeans", {"name": "sae", "steps": 5}]}),
        {"dictionary": 1, "exemplars": 1, "report": 1},
    ),
    "run.seed": (with_config(run={"seed": 5}), {**AFTER_PARTS, "pfv": 2, "dictionary": 1, "exemplars": 1}),
    "run.precision": (with_config(run={"precision": "bf16"}), BUT_MANIFEST),
    "run.shard_size": (with_config(run={"shard_size": 8}), ONE_SHARD),
    "name": (with_config(name="other"), {"report": 1}),
    "run.batch_size": (with_config(run={"batch_size": 3}), {}),
    "run.device": (with_config(run={"device": "cpu"}), {}),
    "compute.workers": (with_config(compute={"workers": 7}), {}),
    "compute.memory_limit": (with_config(compute={"memory_limit": "3GB"}), {}),
    "run.max_bad_fraction": (with_config(run={"max_bad_fraction": 0.5}), {"report": 1}),
}


@dataclass(frozen=True)
class Place:
    """Pictures with masks, a finished store beside them, and the config of that study."""

    root: Path
    config: dict[str, Any]

    @property
    def store(self) -> Path:
        """The store."""
        return self.root / "store"


@pytest.fixture(scope="module")
def base(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study done once."""
    root = tmp_path_factory.mktemp("base")
    write_folder(root / "images", {"a": 4, "b": 4})
    for path in sorted((root / "images").rglob("*.*")):
        mask = (np.arange(32)[:, None] // 16 * 2 + np.arange(40)[None, :] // 20).astype(np.uint8)
        target = (root / "masks" / path.relative_to(root / "images")).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(target)
    return root


@pytest.fixture
def place(base: Path, run_chain: Chain, tmp_path: Path) -> Place:
    """A copy of the pictures with the study done on them; the store is filled once and then copied.

    Paths are part of keys: the copy is moved to where the first study stood.
    """
    home, kept = base / "home", base / "kept"
    if not kept.exists():
        for name in ("images", "masks"):
            shutil.copytree(base / name, home / name)
        done = run_chain(config_of(home), home / "store")
        assert done.counts == ALL
        home.rename(kept)
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(kept, home)
    return Place(home, config_of(home))


def config_of(root: Path) -> dict[str, Any]:
    return config_with(CONFIG, dataset={"path": str(root / "images"), "masks": str(root / "masks")})


@pytest.mark.parametrize("name", MATRIX)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(run_chain: Chain, place: Place, name: str) -> None:
    change, expected = MATRIX[name]
    changed = config_with(place.config, **change(place.root))
    open_source.cache_clear()
    planned = Planner(Study(StudyConfig.model_validate(changed), open_store(place.store))).all()
    ran = run_chain(changed, place.store)
    assert ran.counts == expected
    # The run did what the plan had said: all that was due, and of what waited for a manifest some or none.
    due = {one.unit for one in planned if one.reason is not None and one.key is not None}
    waiting = {one.unit for one in planned if one.key is None}
    assert due <= set(ran.executed) <= due | waiting
    assert run_chain(changed, place.store).counts == {}


NOT_RUN = ("fit", "truth", "concept_graph", "cafe", "train", "train_test", "importance", "importance_seeds")
AFTER_CODE = {
    # The images are what they were: nothing else reads how they were listed.
    "manifest": {"manifest": 2, "report": 1},
    "predict": AFTER_PREDICT,
    "parts": AFTER_PARTS,
    "pfv": {"pfv": 2, "dictionary": 1, "exemplars": 1, "report": 1},
    "dictionary": {"dictionary": 1, "exemplars": 1, "report": 1},
    "exemplars": {"exemplars": 1, "report": 1},
    "attribute": {"attribute": 4, "metrics": 4, "report": 1},
    "metrics": {"metrics": 4, "report": 1},
    "report": {"report": 1},
}


# Not run here: no method learns from data (see tests/tasks/test_concept_fit.py), no metric reads the truth (see
# tests/tasks/test_truth_files.py), no graph is made, no latent explained (see tests/tasks/test_concept_graph.py),
# nothing is trained (see tests/tasks/test_training.py), no network evaluated (see tests/tasks/test_importance.py).
@pytest.mark.parametrize("name", [name for name in STAGES if name not in NOT_RUN])
def test_new_code_of_a_stage_reruns_it_and_what_reads_it(
    run_chain: Chain, place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = STAGES[name].version
    monkeypatch.setitem(STAGES, name, replace(STAGES[name], version=version + 1))
    planned = Planner(Study(StudyConfig.model_validate(place.config), open_store(place.store))).all()
    reasons = {one.detail for one in planned if one.unit.stage == name}
    assert reasons == {f"version: {version} -> {version + 1}"}
    assert {one.reason for one in planned if one.unit.stage == name} == {"code"}
    assert run_chain(place.config, place.store).counts == AFTER_CODE[name]


def test_the_matrix_changes_every_key_of_the_config() -> None:
    """A key that is added to the config has to be added here too."""
    said = {name.split(".")[0] + "." + name.split(".")[1] for name in MATRIX if "." in name}
    sections = {name: field.annotation for name, field in StudyConfig.model_fields.items()}
    keys = {
        f"{section}.{key}" for section, model in sections.items() for key in getattr(model, "model_fields", {})
    }
    elsewhere = {
        "dataset.kind": "another kind is another source, with other paths",
        "dataset.classes": "labels, as in test_plan",
        "dataset.masks": "as the pixels of a mask",
        "dataset.images": "the demo's",
        "dataset.seed": "the demo's",
        "model.pretrained": "weights",
        "model.checkpoint": "weights",
        "concepts.extractors": "an extractor more",
        "compute.scheduler": "where it is computed",
        **dict.fromkeys(
            ("truth.masks", "truth.foreground", "truth.ignore", "truth.boxes"), "tests/tasks/test_truth_files.py"
        ),
    }
    assert keys - said - elsewhere.keys() == set()
