"""The method ``importance``: a trained IA's map on any model's pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.xai_core.inherent.small import GRID, PATCH, SIDE, built, saved
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.inherent.method import ImportanceOptions
from xai_core.models import ModelSpec, load_classifier
from xai_core.registry import methods, variant_id
from xai_core.training import digest_of


@pytest.fixture
def ia_file(tmp_path: Path) -> Path:
    return saved(built("ia"), tmp_path / "ia.safetensors")


def test_the_map_is_the_importance_of_the_picture_in_the_ias_own_terms(ia_file: Path) -> None:
    model, images = tiny_vit(), pictures(3)[0]
    options = {"checkpoint": str(ia_file)}
    maps = attribute(model, images, torch.tensor([0, 1, 2]), method="importance", options=options)
    module = built("ia").module
    for image, found in zip(images, maps, strict=True):
        picture = model.denormalise(image[None]).float()
        small = F.interpolate(picture, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(module.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            expected = module.importance_net((small - mean) / std)[0]
        # Patches of 4 pixels in 16, so of 8 in the model's 32.
        for row in range(GRID):
            for column in range(GRID):
                patch = found[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                torch.testing.assert_close(patch, expected[row, column].expand(8, 8))
    assert float(maps.std()) > 0.01


def test_at_its_own_size_nothing_is_resampled(ia_file: Path) -> None:
    model = load_classifier(ModelSpec("resnet10t", False, transform={"input_size": (3, SIDE, SIDE)}))
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    options, targets = {"checkpoint": str(ia_file)}, torch.tensor([1, 2])
    maps = attribute(model, model.normalise(images), targets, method="importance", options=options)
    ia = built("ia")
    with torch.no_grad():
        expected = ia.module.importance(ia.normalise(images))
    native = attribute(model, model.normalise(images), targets, method="importance", options=options, native=True)
    torch.testing.assert_close(native, expected)
    assert torch.equal(maps, native.repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2))


def test_it_names_no_class_and_depends_on_no_batch(ia_file: Path) -> None:
    model, images = tiny_cnn(), pictures(5)[0]
    classes = torch.tensor([[0, 1]]).expand(5, 2)
    options = {"checkpoint": str(ia_file)}
    maps = attribute_classes(model, images, classes, method="importance", options=options, batch_size=2)
    assert torch.equal(maps[:, 0], maps[:, 1])
    whole = attribute_classes(model, images, classes, method="importance", options=options)
    torch.testing.assert_close(maps, whole)
    assert not methods.get("importance").class_specific


def test_ids_tell_the_content_and_new_content_is_read(ia_file: Path, tmp_path: Path) -> None:
    options = ImportanceOptions(str(ia_file))
    first = variant_id("importance", options)
    assert first == f"importance[checkpoint={digest_of(ia_file)[:12]}]"
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(ia_file.read_bytes())
    assert variant_id("importance", ImportanceOptions(str(copy))) == first
    model, images = tiny_cnn(), pictures(1)[0]
    before = attribute(model, images, torch.tensor([0]), method="importance", options=options)
    other = built("ia", seed=3)
    with torch.no_grad():
        other.module.importance_net.fc.bias += 1
    saved(other, ia_file)
    after = attribute(model, images, torch.tensor([0]), method="importance", options=options)
    assert variant_id("importance", options) != first
    assert not torch.equal(before, after)


def test_what_is_no_trained_ia_is_refused(tmp_path: Path, ia_file: Path) -> None:
    model, images = tiny_cnn(), pictures(1)[0]

    def explain(**options: str) -> None:
        attribute(model, images, torch.tensor([0]), method="importance", options=options)

    with pytest.raises(UsageError, match="needs its option checkpoint, the file of a trained IA"):
        explain()
    with pytest.raises(UsageError, match="checkpoint: expected a file, got none at"):
        explain(checkpoint=str(tmp_path / "nowhere.safetensors"))
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="which is none"):
        explain(checkpoint=str(garbage))
    other = saved(built("ea"), tmp_path / "ea.safetensors", "ea", checkpoint=str(ia_file))
    with pytest.raises(UsageError, match="expected one of kind ia, got kind ea"):
        explain(checkpoint=str(other))
    lying = built("ia")
    lying.module.importance_net.fc = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="expected the weights of the IA that its header names"):
        explain(checkpoint=str(saved(lying, tmp_path / "lying.safetensors")))
