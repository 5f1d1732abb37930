"""VAR in a study: options survive the config, distributions lie in the store, and the report shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flows.config import load_config
from storage import open_store
from storage.sources import decode_image
from storage.store import Store
from tasks.config import StudyConfig, options_of
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.report.contests import claimed
from tasks.report.stage import render
from tasks.sources import open_source
from tasks.stage import Context
from tasks.study import Study
from tasks.worker import study_classifier
from tests.tasks.test_report import body_of, run_study
from xai_core.attribution import attribute
from xai_core.errors import UsageError
from xai_core.registry import methods, variant_id

PLAIN = {"name": "var", "of": {"name": "grad_cam", "layer": "layer3"}, "classes": "top_k+lowest", "k": 2}
KEPT = {**PLAIN, "keep_distributions": True}
ID = "var[of=grad_cam[layer=layer3],classes=top_k+lowest,k=2]"
CLASSES = 4
SIZE = 64


def test_nested_options_survive_the_config_and_json() -> None:
    for method in (
        "var",
        "{name: var, of: grad_cam, classes: top_k+lowest, k: 5}",
        "{name: var, of: {name: integrated_gradients, steps: 20}, classes: given, given: [7, 3]}",
    ):
        config = load_config(None, [f"methods=[{method}]"])
        again = StudyConfig.model_validate_json(config.model_dump_json())
        assert again == config
        assert StudyConfig.model_validate(config.model_dump(mode="json")) == config
        assert again.identity() == config.identity()
        options = options_of(methods, again.methods[0])
        assert options == options_of(methods, config.methods[0])
        assert variant_id("var", options) == config.methods[0].id


def test_the_wrapped_methods_defaults_are_written_out() -> None:
    """Its defaults are part of the key, like anyone's: a later default makes another key."""
    short = load_config(None, ["methods=[{name: var, of: grad_cam}]"])
    long = load_config(None, ["methods=[{name: var, of: {name: grad_cam, layer: null}, k: 5}]"])
    assert short.methods == long.methods
    assert short.methods[0].options["of"] == {"name": "grad_cam", "layer": None}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: var, of: grad_cm}", r"methods\.0: option of: unknown method 'grad_cm': did you mean 'grad_cam'"),
        ("{name: var, of: 3}", r"methods\.0: option of: expected a method's name, or a mapping"),
        (
            "{name: var, of: {name: integrated_gradients, steps: many}}",
            r"methods\.0: option of: option steps: .+ valid integer.+ got 'many'",
        ),
        (
            "{name: var, of: {name: integrated_gradients, stps: 2}}",
            r"methods\.0: option of: no option 'stps'; it takes steps",
        ),
        (
            "{name: var, classes: best_worst, k: 7}",
            r"methods\.0: var\.k: expected with classes top_k\+lowest only",
        ),
        ("{name: var, given: [x]}", r"methods\.0: option given\.0: .+ valid integer"),
        ("var, {name: var, keep_distributions: true}", r"methods: .+ named more than once"),
    ],
)
def test_what_is_wrong_inside_is_refused_by_its_key(method: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, [f"methods=[{method}]"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one of them black, in two folders, and one that is broken."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) * (index > 0)
        (place / f"class{index % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"class{index % 2}" / f"{index}.png")
    (place / "class0" / "broken.png").write_bytes(b"no picture at all")
    return place


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("store"), create=True)


def study_of(folder: Path, store: Store, method: Any) -> Study:
    document = {
        "name": "var",
        "dataset": {"kind": "folder", "path": str(folder)},
        "model": {
            "name": "resnet10t",
            "pretrained": False,
            "create_args": {"num_classes": CLASSES},
            "transform": {"input_size": [3, SIZE, SIZE]},
        },
        "parts": {"parser": "grid", "k": 4},
        "methods": [method],
        "metrics": [],
        "run": {"shard_size": 4, "max_bad_fraction": 0.5},
    }
    return Study(StudyConfig.model_validate(document), store)


@pytest.fixture(scope="module")
def context(folder: Path, store: Store) -> Context:
    return run_study(study_of(folder, store, KEPT))


def test_distributions_are_arrays_of_the_stage(context: Context, store: Store) -> None:
    run_id = context.work.facts["run_id"]
    names = [name for name in store.results(run_id).array_names() if name.startswith("attribute/")]
    assert set(names) == {
        f"attribute/{ID}/{name}" for name in ("maps", "scale", "valid", "distributions", "classes", "base")
    }
    found = {name.rsplit("/", 1)[1]: store.results(run_id).xarray(name) for name in names}
    shares, classes = found["distributions"], found["classes"]
    assert shares.dims == ("image", "class", "y", "x")
    assert classes.dims == ("image", "class")
    assert shares.dtype == np.float16
    assert shares.shape == (6, 4, SIZE, SIZE)
    good = shares["valid"].values
    assert good.sum() == 5
    assert np.allclose(shares.values[good].astype(np.float64).sum(axis=1), 1.0, atol=4e-3)
    assert (classes.values[good][:, :3] >= 0).all()
    assert (classes.values[good][:, 3] == -1).all(), "the target is the most probable class: its slot stays empty"
    maps = found["maps"].values.astype(np.float64) * found["scale"].values[:, None, None]
    refined = found["base"].values * shares.values[:, 0].astype(np.float64)
    kept = maps[good] != 0
    assert 0 < kept.mean() < 1
    assert np.allclose(maps[good][kept], refined[good][kept], rtol=3e-3, atol=1e-3 * np.abs(refined[good]).max())


def test_the_map_is_that_of_the_method_without(context: Context, folder: Path, store: Store) -> None:
    """Another key, the same id, and the same map to the bit."""
    plain = run_study(study_of(folder, store, PLAIN))
    assert plain.work.facts["run_id"] != context.work.facts["run_id"]
    first, second = (
        store.results(one.work.facts["run_id"]).xarray(f"attribute/{ID}/maps").values for one in (context, plain)
    )
    assert np.array_equal(first, second)
    names = store.results(plain.work.facts["run_id"]).array_names()
    assert f"attribute/{ID}/distributions" not in names


def test_a_config_that_went_through_json_is_up_to_date(context: Context, folder: Path, store: Store) -> None:
    config = StudyConfig.model_validate_json(study_of(folder, store, KEPT).config.model_dump_json())
    planner = Planner(Study(config, store))
    planned = {name: planner.stage(stage) for name, stage in STAGES.items()}
    assert planned["attribute"]
    assert not any(to_run(one) for one in planned.values())


def test_the_report_shows_every_class_of_every_picture(context: Context) -> None:
    page = render(context)
    body = body_of(page)
    assert body.count('class="contest"') == 5
    contests = re.findall(r'<div class="contest">(.*?)</article>', body, flags=re.DOTALL)
    for one in contests:
        assert one.count("<img") == 3 + 3
        assert one.count("target, claims") == 1
        captions = re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figcaption>", one)
        assert [name for name, _ in captions[:3]] == ["image", "grad_cam[layer=layer3]", "contrasted"]
        assert {name for name, _ in captions[3:]} <= {str(index) for index in range(CLASSES)}
    assert "on one scale" in body
    assert all('src="data:image/jpeg;base64,' in one for one in re.findall(r"<img[^>]*>", page))
    assert render(context) == page


def test_a_report_without_distributions_says_nothing_of_them(folder: Path, store: Store) -> None:
    body = body_of(render(run_study(study_of(folder, store, PLAIN))))
    assert 'class="contest"' not in body
    assert "on one scale" not in body


def test_a_pixel_is_claimed_by_the_one_that_has_most_of_it() -> None:
    shares = np.array([[[0.5, 0.2, 0.4]], [[0.3, 0.6, 0.4]], [[0.2, 0.2, 0.2]]])
    assert claimed(shares).tolist() == pytest.approx([1 / 3, 1 / 3, 0])


def test_a_study_stores_what_attribute_gives(context: Context, store: Store) -> None:
    model = study_classifier(context)
    results = store.results(context.work.facts["run_id"])
    images = [one for one in results.images() if one.target is not None]
    source = open_source(context.config.dataset)
    inputs = torch.stack([model.preprocess(decode_image(source.read(one.path))) for one in images])
    targets = torch.tensor([one.target for one in images])
    options = {key: value for key, value in PLAIN.items() if key != "name"}
    expected = attribute(model, inputs, targets, method="var", options=options).numpy()
    ids = [one.image_id for one in images]
    maps, scale = (results.xarray(f"attribute/{ID}/{name}").sel(image=ids).values for name in ("maps", "scale"))
    found = maps.astype(np.float32) * scale[:, None, None]
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())
