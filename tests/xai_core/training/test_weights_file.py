"""Files of trained weights: whole, the same twice, and refused where they do not belong."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from storage.canonical import digest_file
from tests.xai_core.training.tiny import network
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, load_classifier, weights_digest
from xai_core.registry import Registry
from xai_core.training import KindEntry, digest_of, kinds, model_digest, read_about, read_trained, save_trained

ABOUT: dict[str, Any] = {"kind": "aha", "config": {"grid": [7, 7]}, "weights": "a" * 64, "model": {"name": "x"}}


def test_a_file_holds_the_weights_and_what_they_are(tmp_path: Path) -> None:
    module, path = network(), tmp_path / "one.safetensors"
    save_trained(path, module, {**ABOUT, "epoch": 3})
    tensors, about = read_trained(path, kinds=("aha",), weights="a" * 64)
    assert about == {**ABOUT, "epoch": 3} == read_about(path)
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in module.state_dict().items())
    save_trained(tmp_path / "two.safetensors", module.state_dict(), {"epoch": 3, **ABOUT})
    assert digest_of(path) == digest_of(tmp_path / "two.safetensors") == digest_file(path)


def test_other_content_under_the_same_name_has_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_trained(path, network(), ABOUT)
    before = digest_of(path)
    save_trained(path, network(seed=1), {**ABOUT, "more": "bytes"})
    assert digest_of(path) == digest_file(path) != before


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    path, wrong = tmp_path / "one.safetensors", tmp_path / "wrong.safetensors"
    save_trained(path, network(), ABOUT)
    with pytest.raises(UsageError, match=r"got no file at .*none\.safetensors"):
        read_trained(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="expected a file, got none"):
        digest_of(tmp_path / "none.safetensors")
    save_file({"weight": torch.ones(2)}, wrong)
    contents = [wrong.read_bytes(), path.read_bytes()[:-5], b"", pickle.dumps({"weight": 1})]
    for content in contents:
        wrong.write_bytes(content)
        with pytest.raises(UsageError, match="expected a file that `vitrine train` wrote, got"):
            read_trained(wrong)
    with pytest.raises(UsageError, match="expected one of kind ia or ea, got kind aha"):
        read_trained(path, kinds=("ia", "ea"))
    with pytest.raises(UsageError, match=rf"model with weights {'b' * 64}, got .* for {'a' * 64}"):
        read_trained(path, weights="b" * 64)
    with pytest.raises(UsageError, match="expected kind, config, weights, model, got no weights, model"):
        save_trained(path, network(), {"kind": "aha", "config": {}})


def test_what_belongs_to_no_model_fits_every_model(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_trained(path, network(), {**ABOUT, "weights": None})
    assert read_about(path, weights="b" * 64)["weights"] is None


def test_the_digest_of_a_model_is_that_of_its_weights_wherever_they_came_from(tmp_path: Path) -> None:
    spec, path = ModelSpec("vitrine_demo_resnet"), tmp_path / "weights.safetensors"
    model = load_classifier(spec)
    digest = model_digest(model)
    assert digest == weights_digest(model.module) == model_digest(model)
    save_file(model.module.state_dict(), path)
    from_file = load_classifier(replace(spec, checkpoint=str(path)))
    assert model_digest(from_file) == digest
    copy = Classifier(deepcopy(from_file.module), from_file.spec)
    next(copy.module.parameters()).mul_(2)
    assert model_digest(copy) == weights_digest(copy.module) != digest
    assert model_digest(from_file) == digest
    next(from_file.module.parameters()).mul_(2)
    assert model_digest(from_file) == model_digest(copy)


def test_a_kind_is_registered_once_and_says_what_it_is() -> None:
    @dataclass(frozen=True)
    class Options:
        width: int = 3

    own: Registry[KindEntry] = Registry("kind of training", KindEntry)

    @own.register("tiny", group="explainer", options=Options, method="tiny")
    def tiny(model: object, options: Options) -> None:
        """A tiny one."""

    entry = own.get("tiny")
    assert (entry.summary, entry.reads_labels(Options()), entry.own_model) == ("A tiny one.", True, False)
    assert entry.config(None, Options(5)) == {"width": 5}  # type: ignore[arg-type]
    assert {"classifier"} <= set(kinds.names())
