"""Trainings as a stage of a study: rows and weights in the store, pictures on disk, and the report's section."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from storage.canonical import digest_file
from storage.commits import CommitRecord, Unit
from storage.store import Store, open_store
from storage.verify import verify_store
from tasks.checkpoint import Checkpoint
from tasks.config import StudyConfig
from tasks.execute import execute
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.report.training import training_section
from tasks.sources import open_source
from tasks.study import Study, with_digests
from tasks.training.picture_file import Rows, picture_file
from tasks.training.pictures import deal
from tasks.training.stage import STAGE
from tasks.training.told import Word, last_word, telling
from tests.conftest import TINY, Ran, config_with, queries_of
from tests.memory import STATUS
from tests.xai_core.training.tiny import network
from xai_core.errors import UsageError
from xai_core.models import ModelSpec, load_classifier
from xai_core.training import digest_of, kinds, read_trained, save_trained

Chain = Callable[[dict[str, Any], Path], Ran]
COLOURS = ("blue", "green", "red")
MODEL = {
    "name": "resnet18",
    "pretrained": False,
    "create_args": {"num_classes": 3, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "transform": {"input_size": [3, 32, 32], "crop_pct": 1.0},
}
RECIPE = {"epochs": 6, "batch_size": 12, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours with noise, which a few steps tell apart."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for label, name in enumerate(COLOURS):
        (folder / name).mkdir()
        for index in range(20):
            pixels = generator.integers(0, 80, (40, 48, 3))
            pixels[..., label] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder


def study(folder: Path, recipe: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": str(folder)}
    chosen = {"kind": "classifier", "recipe": {**RECIPE, **(recipe or {})}, "held_out": 0.2, **training}
    return {
        "name": "colours",
        "dataset": data,
        "model": MODEL,
        "methods": [],
        "metrics": [],
        "training": {"test": {**data, "limit": 12}, **chosen},
        "run": {"shard_size": 16, "max_bad_fraction": 0.5},
    }


@pytest.fixture(scope="module")
def ran(run_chain: Chain, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(study(colours), tmp_path_factory.mktemp("training") / "store")


def record_of(store: Store) -> CommitRecord:
    (record,) = {one.key: one for _, one in store.records() if one.unit.stage == "train"}.values()
    return record


def weights_path(store: Store) -> Path:
    return store.read_file(record_of(store), "trained")


def planned(document: dict[str, Any], store: Store) -> Study:
    open_source.cache_clear()
    return Study(StudyConfig.model_validate(document), store)


# --- the stage ------------------------------------------------------------------------------------------------


def test_a_study_that_asks_model_runs_nothing_else(ran: Ran) -> None:
    assert ran.counts == {"manifest": 4, "train": 1, "train_test": 1, "report": 1}
    assert not (ran.store.root / "work").exists()
    assert verify_store(ran.store).damage == ()
    facts = record_of(ran.store).facts
    assert {name: facts[name] for name in ("images", "ok", "pictures", "held_out", "resumed_at", "score")} == {
        "images": 60,
        "ok": 60,
        "pictures": 48,
        "held_out": 12,
        "resumed_at": 0,
        "score": 1.0,
    }


def test_the_log_is_asked_in_sql(ran: Ran) -> None:
    rows = ran.sql("select * from training order by epoch, split, name")
    assert {row["run_id"] for row in rows} == {ran.run_id}
    assert {(row["split"], row["name"]) for row in rows} == {
        ("train", "accuracy"),
        ("train", "learning_rate"),
        ("train", "loss"),
        ("held_out", "loss"),
        ("held_out", "score"),
        ("test", "loss"),
        ("test", "score"),
    }
    losses = {row["epoch"]: row for row in rows if (row["split"], row["name"]) == ("train", "loss")}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert [losses[epoch]["step"] for epoch in sorted(losses)] == [4, 8, 12, 16, 20, 24]
    assert losses[6]["value"] < losses[1]["value"]
    (test,) = [row for row in rows if (row["split"], row["name"]) == ("test", "score")]
    assert (test["value"], test["epoch"]) == (1.0, record_of(ran.store).facts["epoch"])


def test_the_file_says_what_is_in_it_and_is_a_models_checkpoint(ran: Ran, colours: Path) -> None:
    path = weights_path(ran.store)
    tensors, about = read_trained(path, kinds=("classifier",))
    assert (about["kind"], about["weights"], about["config"]) == ("classifier", None, {"label_smoothing": 0.1})
    assert about["model"]["name"] == "resnet18"
    assert about["recipe"]["epochs"] == 6
    assert str(colours) not in json.dumps(about)
    model = load_classifier(
        ModelSpec("resnet18", checkpoint=str(path), create_args=MODEL["create_args"], transform=MODEL["transform"])
    )
    assert all(torch.equal(tensors[name], one) for name, one in model.module.state_dict().items())
    right = []
    for label, name in enumerate(COLOURS):
        inputs = [model.preprocess(Image.open(one)) for one in sorted((colours / name).iterdir())]
        right += (model(torch.stack(inputs)).argmax(1) == label).tolist()
    assert np.mean(right) > 0.95


def test_the_same_study_gives_the_same_bytes_and_another_seed_others(
    ran: Ran, run_chain: Chain, colours: Path, tmp_path: Path
) -> None:
    digest = digest_file(weights_path(ran.store))
    again = run_chain(study(colours), tmp_path / "again")
    other = run_chain(study(colours, {"seed": 1}), tmp_path / "other")
    assert digest_file(weights_path(again.store)) == digest
    assert digest_file(weights_path(other.store)) != digest
    assert record_of(again.store).key == record_of(ran.store).key


@pytest.mark.parametrize("test", [None, {"limit": 13}])
def test_the_test_pictures_are_in_no_key_of_the_training(
    ran: Ran, colours: Path, test: dict[str, Any] | None
) -> None:
    def keys(document: dict[str, Any]) -> dict[str, str | None]:
        return {one.unit.stage: one.key for one in Planner(planned(document, ran.store)).all()}

    before = keys(study(colours))
    data = {"kind": "folder", "path": str(colours)}
    after = keys(study(colours, test=None if test is None else {**data, **test}))
    assert after["train"] == before["train"] == record_of(ran.store).key
    assert after.get("train_test") != before["train_test"]


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"epochs": 7}},
        {"held_out": 0.3},
        {"held_out_seed": 1},
        {"kind": {"name": "classifier", "label_smoothing": 0.2}},
    ],
)
def test_whatever_a_training_depends_on_is_in_its_key(ran: Ran, colours: Path, change: dict[str, Any]) -> None:
    def key(document: dict[str, Any]) -> str | None:
        planner = Planner(planned(document, ran.store))
        (one,) = [one for one in planner.all() if one.unit.stage == "train"]
        return one.key

    assert key(study(colours)) == record_of(ran.store).key
    assert key(study(colours, **change)) != record_of(ran.store).key


def test_training_starts_from_the_models_weights(
    ran: Ran, run_chain: Chain, colours: Path, tmp_path: Path
) -> None:
    path = tmp_path / "first.safetensors"
    shutil.copyfile(weights_path(ran.store), path)
    document = study(colours, {"epochs": 1, "learning_rate": 1e-12}, held_out=0.0)
    document["model"] = {**MODEL, "checkpoint": str(path)}
    after = load_file(weights_path(run_chain(document, tmp_path / "store").store))
    before = load_file(path)
    kept = [torch.allclose(before[one], after[one], atol=1e-6) for one in before if one.endswith("conv1.weight")]
    assert kept and all(kept)


def test_the_cached_model_that_studies_explain_is_not_the_one_that_is_trained(ran: Ran) -> None:
    from tasks.worker import classifier

    config = StudyConfig.model_validate(study(Path("."))).model
    fresh = load_classifier(config.spec()).module.state_dict()
    kept = classifier(config.model_dump_json(), "cpu").module
    assert all(torch.equal(fresh[name], one) for name, one in kept.state_dict().items())
    assert not any(one.requires_grad for one in kept.parameters())


def test_pictures_that_break_after_they_were_listed_are_set_aside(colours: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(colours, tmp_path / "images")
    store = open_store(tmp_path / "store", create=True)
    planner = Planner(planned(study(folder), store))
    for work in to_run(planner.stage(STAGES["manifest"])):
        execute(work)
    (folder / "red" / "03.png").write_bytes(b"no picture")
    (folder / "blue" / "05.png").unlink()
    (work,) = to_run(planner.stage(STAGES["train"]))
    receipt = execute(work)
    assert (receipt.images, receipt.ok, receipt.quarantined) == (60, 58, 2)  # type: ignore[union-attr]
    record = store.done(work.unit, work.key)
    assert record is not None
    assert sorted(store.read_table(record, "quarantine")["path"].to_pylist()) == ["blue/05.png", "red/03.png"]
    assert record.facts["pictures"] + record.facts["held_out"] == 58


def test_a_checkpoint_of_other_pictures_is_not_gone_on_from(colours: Path, tmp_path: Path) -> None:
    """The same key, but a picture cannot be read any more: what was learnt so far is of no use."""
    folder = shutil.copytree(colours, tmp_path / "images")
    store = open_store(tmp_path / "store", create=True)
    planner = Planner(planned(study(folder, {"learning_rate": 1e30}), store))
    for work in to_run(planner.stage(STAGES["manifest"])):
        execute(work)
    (work,) = to_run(planner.stage(STAGES["train"]))
    checkpoint = Checkpoint(store, work.key)
    checkpoint.write({"study.pictures": torch.zeros(64, dtype=torch.uint8), "identity": torch.zeros(1)})
    with pytest.raises(UsageError, match="expected a finite"):
        execute(work)


def test_a_loss_that_is_no_number_names_the_step_and_what_to_do(colours: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    planner = Planner(planned(study(colours, {"learning_rate": 1e18, "warm_up": 0.0}), store))
    for work in to_run(planner.stage(STAGES["manifest"])):
        execute(work)
    (work,) = to_run(planner.stage(STAGES["train"]))
    told = r"expected a finite (loss|weight), got .* in epoch \d of 6; lower learning_rate .* at step \d+ of 24"
    with pytest.raises(UsageError, match=told) as raised:
        execute(work)
    assert "--set training.recipe.learning_rate=" in str(raised.value)
    assert store.done(work.unit, work.key) is None
    assert not list((store.root / "work").glob(".tmp-*")) if (store.root / "work").exists() else True


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "clasifier"}, "unknown kind of training 'clasifier': did you mean 'classifier'"),
        ({"kind": {"name": "classifier", "smoothing": 1}}, "no option 'smoothing'; it takes label_smoothing"),
        ({"kind": {"name": "classifier", "label_smoothing": 1.0}}, "label_smoothing: expected 0 to below 1"),
        ({"recipe": {"epochs": 0}}, "epochs and batch_size of at least 1"),
        ({"recipe": {"label_smoothing": 0.1}}, "label_smoothing"),
        ({"held_out": 1.0}, "less than 1"),
        ({"test": {"kind": "folder", "path": ".", "masks": "."}}, "test.masks: training reads no masks"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_configs_that_mean_nothing_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        StudyConfig.model_validate(config_with(study(Path(".")), training=changes))


def test_studies_that_train_nothing_keep_their_run_ids() -> None:
    config = StudyConfig()
    assert "training" not in config.identity()
    assert "importance" not in config.identity()
    assert config.asks_model
    document = study(Path("."))
    assert "training" in StudyConfig.model_validate(document).identity()
    assert not StudyConfig.model_validate(document).asks_model
    assert StudyConfig.model_validate(config_with(document, methods=["grad_cam"])).asks_model


def test_labels_without_a_logit_are_refused(colours: Path, tmp_path: Path, run_chain: Chain) -> None:
    document = study(colours)
    document["model"] = {**MODEL, "create_args": {**MODEL["create_args"], "num_classes": 2}}
    with pytest.raises(UsageError, match=r"labels from 0 to 1, got 2 .*num_classes"):
        run_chain(document, tmp_path / "store")


# --- methods by a checkpoint ----------------------------------------------------------------------------------


def by_checkpoint(path: Path) -> dict[str, Any]:
    return config_with(TINY, methods=[{"name": "importance", "checkpoint": str(path)}], metrics=[])


def some_file(path: Path, seed: int) -> Path:
    about = {"kind": "ia", "config": {}, "model": {}, "weights": None}
    save_trained(path, network(seed), about)
    return path


def test_a_methods_key_holds_what_is_in_its_file_and_never_its_path(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)

    def reads(path: Path) -> Any:
        one = planned(by_checkpoint(path), store)
        (choice,) = one.config.methods
        return choice.id, STAGES["attribute"].reads(one, choice.id)

    first, moved = some_file(tmp_path / "a.safetensors", 0), some_file(tmp_path / "b.safetensors", 0)
    other = some_file(tmp_path / "c.safetensors", 1)
    assert reads(first) == reads(moved) != reads(other)
    assert reads(first)[0] == f"importance[checkpoint={digest_of(first)[:12]}]"
    assert str(tmp_path) not in json.dumps(reads(first))
    inner = {"name": "var", "of": {"name": "grad_cam", "checkpoint": str(first)}}
    assert with_digests(inner) == {"name": "var", "of": {"name": "grad_cam", "checkpoint": digest_of(first)}}
    assert with_digests({"checkpoint": ""}) == {"checkpoint": ""}


def test_a_file_that_changes_while_a_study_runs_is_not_read_under_the_old_key(tmp_path: Path) -> None:
    path = some_file(tmp_path / "a.safetensors", 0)
    store = open_store(tmp_path / "store", create=True)
    planner = Planner(planned(by_checkpoint(path), store))
    for name in ("manifest", "predict"):
        for work in to_run(planner.stage(STAGES[name])):
            execute(work)
    work = to_run(planner.stage(STAGES["attribute"]))[0]
    some_file(path, 1)
    with pytest.raises(UsageError, match=r"that the study was planned with .* run it again"):
        execute(work)


# --- the report -----------------------------------------------------------------------------------------------


def test_the_report_shows_how_the_training_went(ran: Ran) -> None:
    (report,) = [one for _, one in ran.store.records() if one.unit == Unit("report")]
    page = ran.store.read_file(report, "report").read_text()
    assert set(re.findall(r'<section id="(\w+)"', page)) == {"training", "timings", "quarantine", "query", "facts"}
    assert set(re.findall(r'<a href="#(\w+)"', page)) == {"training", "timings", "quarantine", "query", "facts"}
    assert "Top-1 accuracy" not in page
    section = page.split('<section id="training">')[1].split("</section>")[0]
    assert "learnt from 48 pictures; 12 more were held out" in section
    assert f"after epoch {record_of(ran.store).facts['epoch']} of 6, with the best held-out score, 1" in section
    assert section.count('class="plot"') == 4
    figures = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    assert len(figures) == page.count('class="plot"')
    losses = {trace["name"]: trace for trace in figures[1]["data"]}
    rows = ran.sql("select value from training where name = 'loss' and split = 'train' order by epoch")
    assert losses["learnt from"]["x"] == [1, 2, 3, 4, 5, 6]
    assert losses["learnt from"]["y"] == pytest.approx([row["value"] for row in rows], rel=1e-3)
    assert set(losses) == {"learnt from", "held out"}
    assert ">test pictures</th>" in section
    assert "learnt from: mean over the batches of an epoch; held out: after every epoch" in section
    assert [figure["layout"]["xaxis"]["dtick"] for figure in figures] == [1] * len(figures)
    assert [len(ran.sql(one)) for one in queries_of(page)] == [
        ran.sql("select count(*) as n from training")[0]["n"]
    ]


def test_what_only_the_test_pictures_have_is_in_the_table_and_makes_no_empty_chart(ran: Ran) -> None:
    log = ran.store.results(ran.run_id).table("training").drop_columns("run_id")
    rows = log.filter((pc.field("split") == "train") | (pc.field("split") == "test"))
    training = StudyConfig.model_validate(ran.store.runs.read(ran.run_id).config).training
    assert training is not None
    section = training_section(rows, record_of(ran.store), training)
    assert "score" in dict(section.table)
    assert [chart.title for chart in section.charts] == ["Loss", "Accuracy", "Learning rate"]


# --- pictures on disk -----------------------------------------------------------------------------------------


def test_a_file_of_pictures_gives_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (9, 3, 5, 7), dtype=np.uint8)
    with picture_file(tmp_path / "work", (5, 7)) as file:
        for one in pictures:
            file.append(one)
        assert len(file) == 9
        assert np.array_equal(file[[8, 0, 3, 3]], pictures[[8, 0, 3, 3]])
        some = Rows(file, [7, 5, 1])
        assert len(some) == 3
        assert np.array_equal(some[[2, 0]], pictures[[1, 7]])
        with pytest.raises(OSError, match="shorter than it was written"):
            file[[9]]
        with pytest.raises(ValueError, match="expected uint8"):
            file.append(pictures[0].astype(np.float32))
        (path,) = (tmp_path / "work").iterdir()
        assert path.stat().st_size == pictures.nbytes
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.skipif(not STATUS.exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    def held() -> int:
        return int(STATUS.read_text().split("VmRSS:")[1].split()[0]) * 1024

    picture = np.ones((3, 224, 224), np.uint8)
    with picture_file(tmp_path, (224, 224)) as file:
        file.append(picture)
        file[[0] * 32]
        before = held()
        for _ in range(1500):
            file.append(picture)
        for start in range(0, 1500, 32):
            file[list(range(start, min(start + 32, 1500)))]
        assert held() - before < 0.1 * 1500 * picture.nbytes
        assert file._rows * picture.nbytes > 200e6


def test_pictures_are_dealt_by_what_they_are() -> None:
    digests = [f"{number:03d}" for number in range(200)]
    dealt = deal(digests, 0.25, 0)
    assert sorted([*dealt.train, *dealt.held_out]) == list(range(200))
    assert len(dealt.held_out) == 50
    assert max(dealt.held_out) > 150 and min(dealt.held_out) < 50
    turned = deal(digests[::-1], 0.25, 0)
    assert {digests[row] for row in dealt.held_out} == {digests[::-1][row] for row in turned.held_out}
    assert deal(digests, 0.25, 1) != dealt
    assert deal(digests, 0.0, 0).held_out == []
    assert len(deal(digests[:3], 0.01, 0).held_out) == 1
    assert len(deal(digests[:3], 0.99, 0).train) == 1
    with pytest.raises(UsageError, match="at least 2 pictures that can be read, got 1"):
        deal(digests[:1], 0.1, 0)


def test_pictures_that_are_the_same_fall_on_one_side() -> None:
    digests = [f"{number // 4:03d}" for number in range(400)]
    dealt = deal(digests, 0.25, 0)
    both = {digests[row] for row in dealt.train} & {digests[row] for row in dealt.held_out}
    assert len(both) <= 1


def test_what_is_told_last_is_read_and_goes_with_the_block(tmp_path: Path) -> None:
    key = "ab" * 32
    assert last_word(tmp_path / "work", key) is None
    with telling(tmp_path / "work", key) as told:
        told.tell(Word("steps", 1, 9))
        told.tell(Word("steps", 2, 9))
        assert last_word(tmp_path / "work", key) == Word("steps", 1, 9)
        told.tell(Word("steps", 9, 9, "the end"))
        assert last_word(tmp_path / "work", key) == Word("steps", 9, 9, "the end")
        assert last_word(tmp_path / "work", "cd" * 32) is None
    assert not list((tmp_path / "work").iterdir())


def test_the_stage_reads_what_it_says() -> None:
    assert (STAGE.sharded, STAGE.reads_model) == (False, True)
    assert {entry.name for entry in kinds if entry.group == "classifier"} == {"classifier"}
