"""Truth of drawn scenes: masks, parts and effects as they were drawn, once for all methods."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from flows.config import load_config
from tasks import truth_scenes
from tasks.config import ModelConfig, StudyConfig
from tasks.plan import Planner
from tasks.study import Study
from tasks.truth import NEEDS, NO_TRUTH, known_needs, reads_truth
from tasks.truth_scenes import true_labels
from tests.conftest import REPOSITORY, TINY, Ran, config_with
from tests.tasks.odd import odd_vit
from tests.tasks.test_truth_files import study_of
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import metrics
from xai_core.synthetic import Rendered, Scene, draw_scene, render, sample_scene

Chain = Callable[[dict[str, Any], Path], Ran]
DRAWN = config_with(
    TINY,
    dataset={"kind": "demo", "images": 6},
    methods=["grad_cam", "kl_hessian"],
    metrics=["true_effect_rank", "true_effect_top1", "pointing_game", {"name": "insertion", "steps": 3}],
    concepts={"layers": []},
    run={"shard_size": 3, "batch_size": 4},
)


@pytest.fixture(scope="module")
def ran(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The chain over six drawn pictures in two shards."""
    return run_chain(DRAWN, tmp_path_factory.mktemp("drawn") / "store")


@pytest.fixture(scope="module")
def model() -> Classifier:
    return load_classifier(ModelConfig().spec())


def test_of_drawn_pictures_object_and_parts_are_known(ran: Ran) -> None:
    masks, parts = (ran.store.xarray(f"truth/{name}", ran.run_id) for name in ("mask", "parts"))
    for row in ran.sql("select image_id, path from images"):
        _, seed, index = row["path"].split("/")
        drawn = render(int(seed), int(index))
        assert np.array_equal(masks.sel(image=row["image_id"]).values, drawn.object_mask)
        assert np.array_equal(parts.sel(image=row["image_id"]).values, drawn.part_labels)
    rows = ran.sql("select * from true_masks order by image_id")
    assert [row["image_id"] for row in rows] == list(range(6))
    for row in rows:
        assert row["inside"] == int((masks.sel(image=row["image_id"]) == 1).sum())
        assert (row["inside"] + row["outside"], row["unknown"], row["reason"]) == (128 * 128, 0, None)


def test_effects_are_those_of_a_slow_twin(ran: Ran, model: Classifier) -> None:
    rows = ran.sql("select * from true_parts join images using (run_id, image_id) order by image_id, part_id")
    for image_id in range(6):
        found = [row for row in rows if row["image_id"] == image_id]
        _, seed, index = found[0]["path"].split("/")
        scene = sample_scene(int(seed), int(index))
        whole = logit(model, draw_scene(scene).image, found[0]["target"])
        assert [(row["part_id"], row["name"], row["deciding"]) for row in found] == [
            (number, part.name, part.deciding) for number, part in enumerate(scene.parts)
        ]
        for row in found:
            without = draw_scene(scene, without=row["part_id"])
            expected = whole - logit(model, without.image, row["target"])
            assert row["effect"] == pytest.approx(expected, abs=1e-4)
            assert row["area"] == (draw_scene(scene).part_labels == row["part_id"]).sum()
    deciding, others = ([abs(row["effect"]) for row in rows if row["deciding"] is one] for one in (True, False))
    assert np.mean(deciding) > 3 * np.mean(others)


def logit(model: Classifier, image: np.ndarray, target: int) -> float:
    with torch.no_grad():
        return float(model(model.preprocess(Image.fromarray(image)).unsqueeze(0))[0, target])


def test_metrics_are_those_of_the_stored_maps_and_effects(ran: Ran) -> None:
    parts = ran.store.xarray("truth/parts", ran.run_id)
    for method in ("grad_cam", "kl_hessian"):
        maps = upright_maps(ran, method)
        rows = ran.sql(f"select image_id, metric, value from metrics where method = '{method}'")
        value = {(row["image_id"], row["metric"]): row["value"] for row in rows}
        for image_id in range(6):
            effects = [
                (row["part_id"], row["effect"])
                for row in ran.sql(
                    f"select part_id, effect from true_parts where image_id = {image_id} and area > 0"
                )
            ]
            labels = parts.sel(image=image_id).values
            scores = [maps[image_id][labels == part].mean() for part, _ in effects]
            expected = scipy.stats.spearmanr(scores, [effect for _, effect in effects]).statistic
            assert value[image_id, "true_effect_rank"] == pytest.approx(expected, abs=1e-9)
            hit = int(np.argmax(scores)) == int(np.argmax([effect for _, effect in effects]))
            assert value[image_id, "true_effect_top1"] == float(hit)


def upright_maps(ran: Ran, method: str) -> np.ndarray:
    from xai_core.attribution import upsample_map

    maps = ran.store.xarray(f"attribute/{method}/maps", ran.run_id)
    scale = ran.store.xarray(f"attribute/{method}/scale", ran.run_id)
    values = torch.from_numpy(maps.values.astype(np.float32) * scale.values[:, None, None])
    return upsample_map(values, (128, 128), maps.attrs["upsampling"] or None).double().numpy()


def test_it_is_found_out_once_for_all_methods(run_chain: Chain, ran: Ran, tmp_path: Path) -> None:
    assert ran.counts["truth"] == 2
    root = Path(shutil.copytree(ran.store.root, tmp_path / "store"))
    assert run_chain(DRAWN, root).counts == {}
    # Neither methods nor other metrics are its business.
    other = run_chain(config_with(DRAWN, methods=["grad_cam", "gradient"], metrics=["true_effect_rank"]), root)
    assert other.counts == {"attribute": 2, "metrics": 4, "report": 1}


def test_batch_size_and_shards_change_nothing(run_chain: Chain, ran: Ran, tmp_path: Path) -> None:
    changes = {"methods": ["grad_cam"], "metrics": ["true_effect_rank"], "run": {"shard_size": 4, "batch_size": 1}}
    other = run_chain(config_with(DRAWN, **changes), tmp_path / "store")
    text = "select image_id, part_id, name, area, effect from true_parts order by 1, 2"
    for one, expected in zip(other.sql(text), ran.sql(text), strict=True):
        assert one == {**expected, "effect": pytest.approx(expected["effect"], abs=1e-4)}


def test_a_study_that_does_not_need_it_has_no_such_stage(ran: Ran, tmp_path: Path) -> None:
    named = {"truth": {"masks": str(tmp_path)}}
    for document, needed in [
        (TINY, False),
        (DRAWN, True),
        (study_of(tmp_path, metrics=["insertion"], **named), False),
        (study_of(tmp_path, **named), True),
        (study_of(tmp_path), False),
    ]:
        assert reads_truth(StudyConfig.model_validate(document)) is needed
    planned = Planner(Study(StudyConfig.model_validate(TINY), ran.store)).all()
    assert "truth" not in {one.unit.stage for one in planned}


# The others name files that have to be trained first.
READY = [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "trained/" not in path.read_text()]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_study_knows_what_its_metrics_need(path: Path) -> None:
    config = load_config(path)
    for choice in config.metrics:
        assert set(NEEDS) & set(metrics.get(choice.name).needs) <= known_needs(config), choice.id


def test_true_parts_go_through_the_models_own_geometry() -> None:
    """Where a model sees a crop, a part's label lies on the pixels that change when the part is not drawn."""
    transform = {"input_size": (3, 96, 96), "crop_pct": 0.7, "interpolation": "bilinear"}
    model = load_classifier(ModelSpec("resnet10t", False, create_args={"num_classes": 3}, transform=transform))
    overlaps = []
    for index in range(4):
        scene = sample_scene(1, index)
        seen = model.preprocess(Image.fromarray(draw_scene(scene).image))
        labels = true_labels(model, draw_scene(scene))
        assert labels.shape == (96, 96)
        for part in range(len(scene.parts)):
            without = model.preprocess(Image.fromarray(draw_scene(scene, without=part).image))
            changed = (seen - without).abs().amax(dim=0) > 0.1
            both, either = (labels == part) & changed, (labels == part) | changed
            if (labels == part).sum() > 100:
                overlaps.append(float(both.sum() / either.sum()))
    assert len(overlaps) > 10
    assert np.median(overlaps) > 0.8


def test_a_scene_that_the_model_cannot_judge_costs_only_the_metrics_of_truth(
    run_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn without its first part, the third picture is one for which the odd model gives no number."""

    def draw(scene: Scene, without: int | None = None) -> Rendered:
        drawn = draw_scene(scene, without)
        if without == 0 and scene == sample_scene(1, 2):
            drawn.image[..., 0] = 255
        return drawn

    monkeypatch.setattr(truth_scenes, "draw_scene", draw)
    changes = {
        "model": {"name": odd_vit.__name__, "pretrained": False, "create_args": {"num_classes": 3}},
        "methods": ["gradient"],
        "metrics": ["true_effect_rank", "pointing_game", "gini"],
        "run": {"max_bad_fraction": 1.0},
    }
    found = run_chain(config_with(DRAWN, **changes), tmp_path / "store")
    (bad,) = found.sql("select path, stage, error, message from quarantine")
    assert (bad["path"], bad["stage"], bad["error"]) == ("demo/1/2", "truth", "NotFinite")
    assert "for the scene without a part" in bad["message"]
    rows = found.sql("select path, metric, value, reason from metrics join images using (run_id, image_id)")
    assert len(rows) == 6 * 3
    for row in rows:
        unknown = row["path"] == "demo/1/2" and row["metric"] != "gini"
        assert (row["reason"] == NO_TRUTH) is unknown
        assert (row["value"] is None) is unknown
