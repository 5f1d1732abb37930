"""The file of a trained explainer: what it belongs to, and what is refused in words."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.xai_core.attribution.learned.small import CONFIG, checkpoint_of
from tests.xai_core.tiny import SIZE, pictures, tiny_vit
from xai_core.attribution import attribute
from xai_core.attribution.learned import DecoderConfig, ExplainerOptions, trained_decoder
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.training import kinds, model_digest, read_trained, save_trained

SMALL = {"num_classes": 3, "channels": (8, 8, 16, 32), "stem_width": 8}
SHOWN = {"input_size": (3, SIZE, SIZE)}


class Explained:
    """A tiny model in float32 with a file of a decoder of random weights."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_vit()
        self.model.module.float()
        self.images, self.targets = pictures(3)
        self.images = self.images.float()
        self.path = checkpoint_of(self.model, folder / "aha.safetensors")
        self.options = {"checkpoint": str(self.path)}

    def __call__(self) -> Tensor:
        return attribute(self.model, self.images, self.targets, method="aha", options=self.options)


def test_a_file_belongs_to_the_weights_it_was_trained_for(tmp_path: Path) -> None:
    explain = Explained(tmp_path)
    usual = explain()
    expected = model_digest(explain.model)
    other = Classifier(deepcopy(explain.model.module), explain.model.spec)
    other.module.head.weight.mul_(2)
    with pytest.raises(UsageError, match=f"(?s){model_digest(other)}.*{expected}"):
        attribute(other, explain.images, explain.targets, method="aha", options=explain.options)
    # Changed in place behind the back of what was read before.
    explain.model.module.head.weight.mul_(2)
    with pytest.raises(UsageError, match=expected):
        explain()
    explain.model.module.head.weight.div_(2)
    assert torch.equal(explain(), usual)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    explain = Explained(tmp_path)
    usual = explain()
    checkpoint_of(explain.model, explain.path, seed=1)
    assert not torch.allclose(explain(), usual)


def test_what_is_no_file_of_this_kind_is_refused(tmp_path: Path) -> None:
    explain = Explained(tmp_path)
    explain.options = {}
    with pytest.raises(UsageError, match="train one with `vitrine train explainer`"):
        explain()
    explain.options = {"checkpoint": str(tmp_path / "none.safetensors")}
    with pytest.raises(UsageError, match="got none at"):
        explain()
    save_trained(explain.path, {"a": torch.zeros(1)}, {"kind": "ia", "config": {}, "weights": None, "model": {}})
    explain.options = {"checkpoint": str(explain.path)}
    with pytest.raises(UsageError, match="expected one of kind aha, got kind ia"):
        explain()


def network(transform: dict | None = None, **arguments: object) -> Classifier:
    """A network whose weights have the same shapes with all the arguments that the tests below give."""
    spec = ModelSpec(
        "resnet10t", False, create_args={**SMALL, **arguments}, transform={**SHOWN, **(transform or {})}
    )
    return load_classifier(spec)


OTHERS = {
    "create_args": ({"output_stride": 8}, "got .*'output_stride': 8.*set model.create_args"),
    "input_size": (
        {"transform": {"input_size": (3, 64, 64)}},
        r"\[3, 32, 32\].*got \[3, 64, 64\]; set model.transform.input_size",
    ),
    "mean": ({"transform": {"mean": (0.5, 0.5, 0.5)}}, r"got \[0.5, 0.5, 0.5\]; set model.transform.mean"),
    "std": ({"transform": {"std": (0.5, 0.5, 0.5)}}, r"got \[0.5, 0.5, 0.5\]; set model.transform.std"),
}


@pytest.mark.parametrize("fact", OTHERS)
def test_equal_weights_of_a_model_built_or_fed_otherwise_are_refused(fact: str, tmp_path: Path) -> None:
    changes, told = OTHERS[fact]
    model, other = network(), network(**changes)
    path = str(checkpoint_of(model, tmp_path / "aha.safetensors"))
    other.module.load_state_dict(model.module.state_dict())
    assert model_digest(other) == model_digest(model)
    with pytest.raises(UsageError, match=f"expected a model with {fact} .*{told}.*or train an explainer"):
        trained_decoder(other, path)
    assert trained_decoder(model, path).bound(model).config.stride == CONFIG.stride


def test_equal_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """One's activation could be another: shapes do not tell."""
    model = tiny_vit()
    path = str(checkpoint_of(model, tmp_path / "aha.safetensors"))
    other = load_classifier(dataclasses.replace(model.spec, name="deit_tiny_patch16_224"))
    other.module.double().load_state_dict(model.module.state_dict())
    told = "with architecture vit_tiny_patch16_224, .*got deit_tiny_patch16_224; set model.name to that"
    with pytest.raises(UsageError, match=told):
        trained_decoder(other, path)


def test_one_network_that_is_fed_otherwise_is_refused_although_its_file_was_read(tmp_path: Path) -> None:
    model = network()
    path = str(checkpoint_of(model, tmp_path / "aha.safetensors"))
    trained_decoder(model, path)
    spec = dataclasses.replace(model.spec, transform={**SHOWN, "mean": (0.0, 0.0, 0.0)})
    with pytest.raises(UsageError, match="with mean"):
        trained_decoder(Classifier(model.module, spec), path)


def test_where_weights_lie_is_no_difference(tmp_path: Path) -> None:
    model = network()
    path = str(checkpoint_of(model, tmp_path / "aha.safetensors"))
    overlay = {"file": str(tmp_path / "elsewhere.safetensors")}
    assert trained_decoder(network(pretrained_cfg_overlay=overlay), path).options.steps == 4
    spec = dataclasses.replace(
        model.spec, create_args={**SMALL, "backbone_args": {"pretrained_cfg_overlay": overlay}}
    )
    config = kinds.get("aha").config(Classifier(model.module, spec), ExplainerOptions())
    assert config["model"]["create_args"]["backbone_args"] == {}


HEADERS = {
    "unknown": {"depth": 3},
    "of another type": {"width": "wide"},
    "layers of another type": {"layers": None},
    "another decoder": {"width": 16},
    "another grid of blocks": {"blocks": 2},
    "half a model": {"model": {"architecture": "resnet10t"}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "aha.safetensors"
    tensors, about = read_trained(checkpoint_of(model, path))
    save_trained(path, tensors, {**about, "config": {**about["config"], **HEADERS[name]}})
    with pytest.raises(UsageError, match=r"(?s)an explainer whose header .*aha\.safetensors .*train it anew"):
        trained_decoder(model, str(path))


@pytest.mark.parametrize("name", ["layers", "model"])
def test_a_header_that_lacks_what_it_needs_is_refused(name: str, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "aha.safetensors"
    tensors, about = read_trained(checkpoint_of(model, path))
    about["config"].pop(name)
    save_trained(path, tensors, about)
    with pytest.raises(UsageError, match=f"KeyError: '{name}'.*train it anew"):
        trained_decoder(model, str(path))


def test_a_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "aha.safetensors"
    tensors, about = read_trained(checkpoint_of(model, path))
    tensors.pop("refine.3.weight")
    save_trained(path, tensors, about)
    with pytest.raises(UsageError, match=r"(?s)refine\.3\.weight.*train it anew"):
        trained_decoder(model, str(path))


@pytest.mark.parametrize("stride", [SIZE // 2 + 1, SIZE, 2 * SIZE])
def test_a_stride_that_leaves_no_order_is_refused(stride: int) -> None:
    options = ExplainerOptions(stride=stride)
    with pytest.raises(
        UsageError, match=f"aha.stride: expected at most {SIZE // 2}, .*got {stride}; set a smaller"
    ):
        kinds.get("aha").function(tiny_vit(), options)


def test_more_cells_than_places_are_refused() -> None:
    """They would be ties: two cells of one place."""
    options = ExplainerOptions(ranking="cells", cells=SIZE // 4 + 1)
    with pytest.raises(UsageError, match=f"aha.cells: expected at most {SIZE // 4} a side.*got {SIZE // 4 + 1}"):
        kinds.get("aha").function(tiny_vit(), options)
    kinds.get("aha").function(tiny_vit(), dataclasses.replace(options, cells=SIZE // 4))


@pytest.mark.parametrize("stride", [SIZE // 2, 5])
def test_a_stride_that_is_accepted_can_be_trained(stride: int) -> None:
    """The largest one, and one that does not divide the picture."""
    model = tiny_vit()
    objective = kinds.get("aha").function(
        model, ExplainerOptions(**{**dataclasses.asdict(CONFIG), "stride": stride})
    )
    assert isinstance(objective.explainer.config, DecoderConfig)
    images, labels = pictures(2)
    loss, _ = objective.loss(images.sigmoid(), labels, 0.0, torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.isfinite(loss)
    assert set(objective.measure(images.sigmoid(), labels)) == {"score", "deletion", "insertion"}
