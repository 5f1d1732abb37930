"""The pfv stage on drawn pictures: what it stores of a sample, and that shards and batches change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from storage.sources import decode_image
from storage.store import Store, open_store
from tasks.config import StudyConfig
from tasks.execute import execute
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.sources import open_source
from tasks.study import Study
from tests.conftest import TINY, config_with
from xai_core.concepts.pfv import vector_index
from xai_core.models import ModelSpec, load_classifier
from xai_core.receptive_fields import feature_vectors, receptive_fields

IMAGES = 7
VIT = config_with(
    TINY,
    dataset={"kind": "demo", "images": IMAGES},
    concepts={"layers": ["blocks.2", "blocks.3.norm1"], "per_image": 3},
)
RESNET = config_with(VIT, model={"name": "vitrine_demo_resnet"}, concepts={"layers": ["layer2", "layer3"]})


def sampled(document: dict[str, Any], root: Path) -> tuple[Store, dict[str, np.ndarray]]:
    """The arrays of the pfv stage over all shards, in image order, after the stages that it reads."""
    store = open_store(root, create=True)
    open_source.cache_clear()
    planner = Planner(Study(StudyConfig.model_validate(document), store))
    works = []
    for stage in ("manifest", "predict", "pfv"):
        works = to_run(planner.stage(STAGES[stage]))
        for work in works:
            execute(work)
    records = [store.done(work.unit, work.key) for work in works]
    return store, {
        name: np.concatenate([store.read_array(record, name) for record in records])
        for name in records[0].facts["arrays"]
    }


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, np.ndarray]]:
    return sampled(VIT, tmp_path_factory.mktemp("pfv") / "vit")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, np.ndarray]]:
    return sampled(RESNET, tmp_path_factory.mktemp("pfv") / "resnet")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Exact in what was drawn; a batch of another size rounds differently."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        tolerance = {"receptive_fields": 2e-3}.get(name.rsplit(".", 1)[-1], 1e-4)
        if np.issubdtype(values.dtype, np.floating):
            np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_vit_gives_drawn_vectors_its_class_token_and_their_fields(vit: tuple) -> None:
    _, arrays = vit
    assert arrays["valid"].all()
    for layer in VIT["concepts"]["layers"]:
        assert arrays[f"{layer}.vectors"].shape == (IMAGES, 4, 96)
        assert arrays[f"{layer}.positions"][:, 3].tolist() == [[-1, 0]] * IMAGES
        assert (arrays[f"{layer}.positions"][:, :3] >= 0).all()
        fields = arrays[f"{layer}.receptive_fields"]
        # Fourteen a side at most: these patches are 8 x 8.
        assert (fields.shape, fields.dtype) == ((IMAGES, 4, 8, 8), np.float16)
        assert np.abs(fields).max(axis=(2, 3)).tolist() == [[1.0] * 4] * IMAGES


def test_a_network_of_maps_gives_no_class_token_and_fields_of_fourteen_a_side(resnet: tuple) -> None:
    _, arrays = resnet
    for layer in ("layer2", "layer3"):
        assert arrays[f"{layer}.vectors"].shape[:2] == (IMAGES, 3)
        assert (arrays[f"{layer}.positions"] >= 0).all()
        assert arrays[f"{layer}.receptive_fields"].shape == (IMAGES, 3, 14, 14)


@pytest.mark.parametrize(("name", "layer", "prefix"), [("vit", "blocks.2", 1), ("resnet", "layer3", 0)])
def test_fields_are_those_of_the_stored_vectors(
    name: str, layer: str, prefix: int, request: pytest.FixtureRequest
) -> None:
    store, arrays = request.getfixturevalue(name)
    model = load_classifier(ModelSpec(f"vitrine_demo_{name}"))
    source = open_source(StudyConfig.model_validate(VIT).dataset)
    paths = [store.read_table(record, "manifest")["path"].to_pylist() for record in manifests(store)]
    images = torch.stack([model.preprocess(decode_image(source.read(path))) for shard in paths for path in shard])
    vectors, positions = (torch.from_numpy(arrays[f"{layer}.{kind}"]) for kind in ("vectors", "positions"))
    index = vector_index(positions.long(), (8, 8), prefix)
    for image, draw in ((0, 0), (3, 2), (6, -1)):
        scalars = feature_vectors(
            layer, torch.tensor([image]), index[image, draw].view(1), vectors[image, draw][None]
        )
        whole = receptive_fields(model, images, scalars)
        size = arrays[f"{layer}.receptive_fields"].shape[2:]
        expected = torch.nn.functional.adaptive_avg_pool2d(whole, size)[0]
        found = arrays[f"{layer}.receptive_fields"][image, draw].astype(np.float32)
        np.testing.assert_allclose(found, (expected / expected.abs().max()).numpy(), atol=2e-3)


def manifests(store: Store) -> list:
    """The records of the manifest stage, in the order of shards."""
    records = [record for record in store.commits if record.unit.stage == "manifest"]
    return sorted(records, key=lambda record: record.unit.shard)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("change", [{"shard_size": 3}, {"shard_size": 100, "batch_size": 1}])
def test_shards_and_batches_change_no_sample(
    name: str, change: dict[str, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    document = config_with({"vit": VIT, "resnet": RESNET}[name], run=change)
    assert_same(sampled(document, tmp_path / "store")[1], request.getfixturevalue(name)[1])


def test_another_seed_draws_other_positions(vit: tuple, tmp_path: Path) -> None:
    other = sampled(config_with(VIT, run={"seed": 1}), tmp_path / "store")[1]
    assert (other["blocks.2.positions"] != vit[1]["blocks.2.positions"]).any()


def test_without_fields_and_class_token_the_same_vectors_are_drawn(vit: tuple, tmp_path: Path) -> None:
    plain = config_with(VIT, concepts={"class_token": False, "receptive_fields": None})
    _, arrays = sampled(plain, tmp_path / "store")
    assert not any("receptive_fields" in name for name in arrays)
    expected = {name: values[:, :3] if name != "valid" else values for name, values in vit[1].items()}
    assert_same(arrays, {name: values for name, values in expected.items() if "receptive" not in name})


def test_a_chosen_attributor_and_size_are_used(tmp_path: Path) -> None:
    fields = {"size": 4, "attributor": {"name": "integrated_gradients", "steps": 2}}
    document = config_with(VIT, concepts={"layers": ["blocks.2"], "receptive_fields": fields, "per_image": 1})
    signed = sampled(document, tmp_path / "store")[1]["blocks.2.receptive_fields"]
    assert signed.shape == (IMAGES, 2, 4, 4)
    assert (signed < 0).any()


def test_xarray_opens_layers_of_different_numbers_of_vectors(tmp_path: Path) -> None:
    """The embedding convolution has no class token; a dimension of one size for all layers would not hold both."""
    document = config_with(VIT, concepts={"layers": ["patch_embed.proj", "blocks.2"], "receptive_fields": None})
    store, arrays = sampled(document, tmp_path / "store")
    (folder,) = (store.root / "arrays" / "pfv").iterdir()
    opened = xarray.open_zarr(folder, consolidated=False)
    assert opened["patch_embed.proj.vectors"].shape[1] == 3
    assert opened["blocks.2.vectors"].shape[1] == 4
    np.testing.assert_array_equal(opened["blocks.2.positions"].values, arrays["blocks.2.positions"])
