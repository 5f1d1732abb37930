"""Files that metrics read are part of what their stage depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import load_config
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.metrics import STAGE
from tasks.study import Study
from tests.conftest import config_with
from xai_core.errors import UsageError


def reads(config: StudyConfig, store: Path) -> Any:
    return STAGE.reads(Study(config, open_store(store, create=True)), "grad_cam")


def test_other_weights_under_the_same_name_are_noticed(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "shuffled.safetensors"
    weights.write_bytes(b"one")
    metrics = [{"name": "randomisation", "test": "labels", "checkpoint": "shuffled.safetensors"}]
    document = tmp_path / "study.yaml"
    document.write_text(yaml.safe_dump(config_with(tiny_config, metrics=metrics)))
    config = load_config(document)
    assert config.metrics[0].options["checkpoint"] == str(weights)
    before = reads(config, tmp_path / "store")
    assert reads(config, tmp_path / "store") == before
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    (elsewhere / weights.name).write_bytes(b"one")
    path = str(elsewhere / weights.name)
    moved = load_config(document, [f"metrics=[{{name: randomisation, test: labels, checkpoint: {path}}}]"])
    assert moved.metrics[0].options["checkpoint"] == path
    assert reads(moved, tmp_path / "store") == before
    weights.write_bytes(b"two")
    assert reads(config, tmp_path / "store") != before
    weights.unlink()
    with pytest.raises(UsageError, match=r"expected a file, got none at .*shuffled\.safetensors"):
        reads(config, tmp_path / "store")
