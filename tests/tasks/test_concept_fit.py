"""Methods that learn from a study's images: fitted once, reused, and again when what they learn from changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from storage.commits import CommitRecord
from storage.store import open_store
from tasks.concept_folder import concept_files, read_concepts
from tasks.config import StudyConfig
from tasks.pipeline import STAGES
from tasks.plan import Planner
from tasks.stage_task import StageError
from tasks.study import Study
from tasks.worker import classifier
from tests.conftest import TINY, Ran, config_with, picture
from xai_core.attribution import attribute
from xai_core.errors import UsageError

Chain = Callable[[dict[str, Any], Path], Ran]
TCAV = {"name": "visual_tcav", "steps": 2, "concept_count": 3, "fit_images": 6}
MCD = {"name": "hu_mcd", "min_size": 2, "fit_images": 6}
STUDY = config_with(
    TINY, dataset={"images": 8}, concepts={"layers": []}, metrics=[{"name": "insertion", "steps": 2}]
)
BOTH = config_with(STUDY, methods=["grad_cam", TCAV, MCD])


def concept_folder(root: Path, *concepts: str) -> Path:
    """Three pictures of every concept."""
    for number, name in enumerate(concepts):
        (root / name).mkdir(parents=True)
        for index in range(3):
            picture(10 * number + index).save(root / name / f"{index}.png")
    return root


def fitted(ran: Ran, method: str) -> CommitRecord:
    (record,) = (one for _, one in ran.store.records() if one.unit.stage == "fit" and one.unit.variant == method)
    return record


def key_of_fit(document: dict[str, Any], store: Path) -> dict[str, str]:
    """Keys of the fits as they are planned over what is done already."""
    planned = Planner(Study(StudyConfig.model_validate(document), open_store(store))).all()
    return {one.unit.variant: str(one.key) for one in planned if one.unit.stage == "fit"}


@pytest.fixture(scope="module")
def ran(run_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(BOTH, tmp_path_factory.mktemp("fit") / "store")


def variant(ran: Ran, name: str) -> str:
    return next(one.variant for one in ran.executed if one.stage == "attribute" and one.variant.startswith(name))


def test_each_learner_is_fitted_once_and_nothing_is_done_again(run_chain: Chain, ran: Ran) -> None:
    assert ran.counts["fit"] == 2
    assert ran.counts["attribute"] == 6
    assert run_chain(BOTH, ran.store.root).counts == {}


def test_a_fit_is_named_tensors_of_so_many_images(ran: Ran) -> None:
    record = fitted(ran, variant(ran, "visual_tcav"))
    assert record.facts["fitted_to"] == 6
    state = load_file(ran.store.read_file(record, "fitted"))
    assert state["directions"].shape[0] == len(state["emblems"]) == 3
    assert fitted(ran, variant(ran, "hu_mcd")).facts["fitted_to"] == 6


def test_maps_and_scores_are_stored_and_measured(ran: Ran) -> None:
    rows = ran.sql("select method, count(*) as n, count(value) as known from metrics group by 1")
    assert {row["method"]: row["n"] for row in rows} == {
        "grad_cam": 8,
        variant(ran, "visual_tcav"): 8,
        variant(ran, "hu_mcd"): 8,
    }
    (scored,) = ran.sql("select count(*) as n, count(distinct image_id) as images from part_scores")
    assert scored == {"n": 32, "images": 8}


def test_stored_maps_are_those_of_the_stored_fit(ran: Ran) -> None:
    name = variant(ran, "visual_tcav")
    state = load_file(ran.store.read_file(fitted(ran, name), "fitted"))
    config = StudyConfig.model_validate(BOTH)
    model = classifier(config.model.model_dump_json(), "cpu")
    (stored, *_) = ran.store.results(ran.run_id).images()
    target = torch.tensor([ran.sql("select target from images where image_id = 0")[0]["target"]])
    inputs = model.preprocess(Image.fromarray(_picture_of(ran, 0))).unsqueeze(0)
    options = {key: value for key, value in TCAV.items() if key != "name"}
    expected = attribute(model, inputs, target, method="visual_tcav", options=options, fitted=state, native=True)
    record = next(
        one
        for _, one in ran.store.records()
        if one.unit.variant == name and one.unit == type(one.unit)("attribute", name, 0)
    )
    np.testing.assert_allclose(ran.store.read_array(record, "maps")[0], expected[0], atol=1e-5)
    assert stored.image_id == 0


def _picture_of(ran: Ran, image_id: int) -> np.ndarray:
    from xai_core.synthetic import render

    (row,) = ran.sql(f"select path from images where image_id = {image_id}")
    _, seed, index = row["path"].split("/")
    return render(int(seed), int(index)).image


def test_the_sample_does_not_depend_on_shards_or_batches(run_chain: Chain, ran: Ran, tmp_path: Path) -> None:
    for number, run in enumerate(({"shard_size": 3}, {"batch_size": 1})):
        other = run_chain(config_with(BOTH, run=run), tmp_path / str(number))
        for name in ("visual_tcav", "hu_mcd"):
            first, second = (
                load_file(one.store.read_file(fitted(one, variant(one, name)), "fitted")) for one in (ran, other)
            )
            for key in first:
                torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5)


def test_an_option_refits_its_method_alone(run_chain: Chain, ran: Ran) -> None:
    changed = config_with(BOTH, methods=["grad_cam", {**TCAV, "concept_count": 2}, MCD])
    again = run_chain(changed, ran.store.root)
    assert again.counts == {"fit": 1, "attribute": 2, "metrics": 2, "report": 1}


def test_more_images_to_draw_from_refit_and_leave_other_methods_alone(run_chain: Chain, tmp_path: Path) -> None:
    document = config_with(STUDY, methods=["grad_cam", TCAV], dataset={"limit": 4})
    run_chain(document, tmp_path / "store")
    more = run_chain(config_with(document, dataset={"limit": 8}), tmp_path / "store")
    attributed = sorted(
        (unit.variant.split("[")[0], unit.shard) for unit in more.executed if unit.stage == "attribute"
    )
    assert more.counts["fit"] == 1
    assert attributed == [("grad_cam", 1), ("visual_tcav", 0), ("visual_tcav", 1)]
    # The smaller study's maps still stand beside the larger one's.
    assert run_chain(document, tmp_path / "store").counts == {}


def test_new_code_of_the_fit_reruns_it_and_what_reads_it(
    run_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    document = config_with(STUDY, methods=["grad_cam", MCD], dataset={"images": 4})
    run_chain(document, tmp_path / "store")
    monkeypatch.setitem(STAGES, "fit", replace(STAGES["fit"], version=2))
    assert run_chain(document, tmp_path / "store").counts == {"fit": 1, "attribute": 1, "metrics": 1, "report": 1}


def test_a_users_folder_gives_the_concepts(run_chain: Chain, tmp_path: Path) -> None:
    folder = concept_folder(tmp_path / "concepts", "dotted", "striped", "random")
    method = {"name": "visual_tcav", "steps": 2, "concepts": str(folder)}
    document = config_with(STUDY, methods=[method], dataset={"images": 4})
    ran = run_chain(document, tmp_path / "store")
    record = fitted(ran, variant(ran, "visual_tcav"))
    with safe_open(ran.store.read_file(record, "fitted"), "pt") as file:
        assert file.get_tensor("directions").shape[0] == 2
        assert '"dotted", "random", "striped"' in file.metadata()["fit"]
    assert str(folder) in record.unit.variant


def test_a_folders_content_is_part_of_the_key_and_its_times_are_not(run_chain: Chain, tmp_path: Path) -> None:
    folder = concept_folder(tmp_path / "concepts", "dotted", "random")
    method = {"name": "visual_tcav", "steps": 2, "concepts": str(folder)}
    document = config_with(STUDY, methods=[method], dataset={"images": 4})
    run_chain(document, tmp_path / "store")
    before = key_of_fit(document, tmp_path / "store")
    (folder / "dotted" / "0.png").touch()
    assert key_of_fit(document, tmp_path / "store") == before
    picture(99).save(folder / "dotted" / "0.png")
    after = key_of_fit(document, tmp_path / "store")
    assert after.keys() == before.keys()
    assert after != before
    assert run_chain(document, tmp_path / "store").counts == {"fit": 1, "attribute": 1, "metrics": 1, "report": 1}


def test_a_folder_without_concepts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"concepts: expected a folder with one folder of pictures a concept, got"
    ):
        concept_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"of every concept, got no sub-folder in"):
        concept_files(tmp_path / "empty")
    (tmp_path / "empty" / "dotted").mkdir()
    with pytest.raises(UsageError, match=r"of every concept, got none in .*dotted"):
        concept_files(tmp_path / "empty")


def test_a_folders_pictures_are_bounded_and_a_broken_one_is_named(tmp_path: Path) -> None:
    folder = concept_folder(tmp_path / "concepts", "dotted")
    model = classifier(StudyConfig.model_validate(STUDY).model.model_dump_json(), "cpu")
    assert read_concepts(folder, model, 2, 0)["dotted"].shape == (2, 3, *model.input_size)
    (folder / "dotted" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"concepts: expected a readable picture at .*1\.png"):
        read_concepts(folder, model, 3, 0)


def test_images_without_parts_are_not_learnt_from(run_chain: Chain, tmp_path: Path) -> None:
    """A study whose pictures cannot be read leaves nothing to learn from, and says so."""
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    for index in range(2):
        (images / f"{index}.png").write_bytes(b"broken")
    document = config_with(
        STUDY,
        methods=[MCD],
        dataset={"kind": "folder", "path": str(tmp_path / "images"), "images": 1},
        run={"max_bad_fraction": 1.0},
    )
    with pytest.raises((StageError, UsageError), match=r"expected images to learn from, got none"):
        run_chain(document, tmp_path / "store")


def test_explain_refuses_what_learns_from_a_data_set(tmp_path: Path) -> None:
    from flows.explain import Request, explain_pictures

    picture(1).save(tmp_path / "one.png")
    request = Request(None, "vitrine_demo_vit", None, ("visual_tcav",), None, ())
    with pytest.raises(UsageError, match=r"'visual_tcav' learns from a data set before it explains"):
        list(explain_pictures([tmp_path / "one.png"], request, tmp_path / "out.png"))
