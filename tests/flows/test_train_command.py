"""``vitrine train`` as it is typed: a training as a study, and its file as the checkpoint of a method."""

from __future__ import annotations

import io
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.config import load_config
from flows.preflight import check_study
from flows.progress import BarProgress, line
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.study import Study
from tasks.training.told import Word
from tests.conftest import TINY, TINY_IA, config_with
from tests.flows.command import call, commits, executions, parsed, vitrine, write_config
from xai_core.errors import UsageError
from xai_core.models import load_classifier
from xai_core.training import digest_of, model_digest, read_about, save_trained

CLASSIFIER: dict[str, Any] = {
    "dataset": {"kind": "demo", "images": 40},
    "model": {
        "name": "resnet18",
        "pretrained": False,
        "create_args": {"num_classes": 12, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        "transform": {"input_size": [3, 32, 32]},
    },
    "training": {
        "kind": "classifier",
        # Long enough to be seen at work by who looks twice a second.
        "recipe": {"epochs": 80, "batch_size": 8},
        "held_out": 0.2,
        "test": {"kind": "demo", "images": 8, "seed": 2},
    },
    "compute": {"workers": 1},
}
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_config(folder / "classifier.yaml", CLASSIFIER)
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, prefect_api: str) -> Done:
    """A classifier trained by the command, with a real Dask worker and the session's Prefect server."""
    return vitrine(
        "train", "classifier", "classifier.yaml", "-o", "out.safetensors", "--store", "store", cwd=place
    )


def test_it_writes_the_weights_and_says_what_came_of_it(place: Path, trained: Done) -> None:
    assert trained.returncode == 0, trained.stderr[-3000:]
    digest = digest_of(place / "out.safetensors")
    assert f"digest   {digest}" in trained.stdout
    for told in (
        "pictures 32, and 8 held out",
        "on those held out, after epoch",
        "the score on the test pictures",
    ):
        assert told in trained.stdout
    assert "method " not in trained.stdout
    assert read_about(place / "out.safetensors")["kind"] == "classifier"
    lines = [line for line in trained.stderr.splitlines() if line.startswith("train: ") and "steps" in line]
    assert lines and "/320 steps  epoch " in lines[-1]


def test_the_same_command_again_does_nothing_and_gives_the_same_file(place: Path, trained: Done) -> None:
    before = commits(place / "store")
    again = call(
        "train", "classifier", "classifier.yaml", "-o", "again.safetensors", "--store", "store", cwd=place
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert executions(again.stderr) == 0
    assert commits(place / "store") == before
    assert (place / "again.safetensors").read_bytes() == (place / "out.safetensors").read_bytes()


def test_rows_of_the_training_are_asked_by_the_command(place: Path, trained: Done) -> None:
    query = "select split, count(*) as n from training group by all order by split"
    found = call("sql", query, "--store", "store", "--format", "json", cwd=place)
    assert [tuple(row.values()) for row in parsed(found.stdout)] == [
        ("held_out", 2 * 80),
        ("test", 2),
        ("train", 3 * 80),
    ]


LEARNT: dict[str, tuple[str, dict[str, Any]]] = {
    "aha": (
        "explainer",
        {"model": {"name": "vitrine_demo_vit"}, "training": {"kind": {"name": "aha", "steps": 3}}},
    ),
    "importance": (
        "importance",
        {
            "model": TINY_IA,
            "training": {"kind": "ia"},
            # A study of its own, which asks for files that are not there yet.
            "importance": {"networks": ["not-there-yet.safetensors"]},
        },
    ),
}


@pytest.mark.parametrize("method", LEARNT)
def test_what_explains_is_trained_alone_and_told_as_a_method(
    tmp_path: Path, prefect_api: str, method: str
) -> None:
    group, document = LEARNT[method]
    training = {**document["training"], "recipe": {"epochs": 1, "batch_size": 4}, "held_out": 0.2}
    data = {"dataset": {"kind": "demo", "images": 10}, "training": training}
    write_config(tmp_path / "c.yaml", {**document, **data})
    done = vitrine("train", group, "c.yaml", "-o", "out.safetensors", "--store", "store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    digest = digest_of(tmp_path / "out.safetensors")
    assert f"method   {method}[checkpoint={digest[:12]}]" in done.stdout
    store = open_store(tmp_path / "store")
    assert {one.split("/")[1] for one in commits(store.root)} == {"manifest", "train", "report"}
    (run,) = store.runs.all()
    assert run.config["compute"]["workers"] == 1, "one with every core, where the config does not say"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("classifier", "c.yaml", "-o", "out.pt"), "--output: expected a file named .safetensors, got 'out.pt'"),
        (
            ("importance", "c.yaml"),
            "expected ea, ia, pa, got classifier; use `vitrine train classifier`",
        ),
        (("classifier", "none.yaml"), "training: expected a section with a kind (classifier), got none"),
        (("classifier", "c.yaml", "--set", "training.recipe.epoch=2"), "training.recipe.epoch"),
        (("classifier", "c.yaml", "--set", "training.kind=clasifier"), "did you mean 'classifier'?"),
        (("classifier", "c.yaml", "--set", "training.held_out=1"), "training.held_out"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything(tmp_path: Path, arguments: Any, told: str) -> None:
    write_config(tmp_path / "c.yaml", CLASSIFIER)
    write_config(tmp_path / "none.yaml", {key: value for key, value in CLASSIFIER.items() if key != "training"})
    found = call("train", *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert told in found.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_paths_in_a_config_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    training = {"kind": {"name": "ea", "checkpoint": "ia.safetensors"}, "test": {"kind": "folder", "path": "test"}}
    document = {"dataset": {"kind": "folder", "path": "train"}, "training": training}
    path = write_config(tmp_path / "a" / "c.yaml", document)
    config = load_config(path).training
    assert config is not None and config.test is not None
    assert config.kind.options["checkpoint"] == str(tmp_path / "a" / "ia.safetensors")
    assert config.test.path == str(tmp_path / "a" / "test")


def test_files_of_weights_are_relative_to_the_config_however_deep_they_are_named(tmp_path: Path) -> None:
    overlay = {"pretrained_cfg_overlay": {"file": "b.safetensors"}}
    arguments = {"checkpoint_path": "a.safetensors", **overlay, "backbone_args": {**overlay, "depth": 2}}
    path = write_config(tmp_path / "c.yaml", {"model": {"name": "resnet18", "create_args": arguments}})
    found = {"pretrained_cfg_overlay": {"file": str(tmp_path / "b.safetensors")}}
    assert load_config(path).model.create_args == {
        "checkpoint_path": str(tmp_path / "a.safetensors"),
        **found,
        "backbone_args": {**found, "depth": 2},
    }


def test_paths_of_methods_in_set_are_relative_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may stand elsewhere, and so may whoever resumes the run."""
    write_config(tmp_path / "c.yaml", TINY)
    model = load_classifier(StudyConfig().model.spec())
    save_trained(
        tmp_path / "ia.safetensors", model.module, {"kind": "ia", "config": {}, "model": {}, "weights": None}
    )
    monkeypatch.chdir(tmp_path)
    chosen = "methods=[{name: importance, checkpoint: ia.safetensors}]"
    (method,) = load_config(Path("c.yaml"), [chosen]).methods
    assert method.options["checkpoint"] == str(tmp_path / "ia.safetensors")


def test_a_line_shows_how_far_it_is() -> None:
    assert line("train", Word("steps", 6, 24, "epoch 1/4"), 18.2) == (
        "train: ██████░░░░░░░░░░░░░░░░░░ 6/24 steps  epoch 1/4  18 s left"
    )
    assert line("train", Word("pictures", 0, 0), None) == f"train: {'░' * 24} 0/0 pictures"


def test_a_bar_moves_inside_its_unit_and_ends_full() -> None:
    screen = io.StringIO()
    bars = BarProgress(Console(file=screen, force_terminal=True, width=120, color_system=None))
    words = (Word("pictures", 16, 32), Word("steps", 6, 24, "epoch 1/4"), Word("steps", 9, 24, "epoch 1/4"))
    try:
        bars.begin("train", 1, 0)
        for word in words:
            bars.tell("train", word, None)
            assert drawn(screen, rf"{word.done}/{word.of} +{word.units}"), screen.getvalue()
        bars.end("train", 1, 0)
        assert drawn(screen, r" 1/1 "), screen.getvalue()
        # Another run may be at this training while this one is at another stage.
        bars.begin("report", 1, 0)
        bars.tell("train", Word("steps", 11, 24, "epoch 2/4"), None)
        assert drawn(screen, r"report .* 0/1 "), screen.getvalue()
    finally:
        bars.close()
    assert screen.getvalue().count("epoch 1/4") == 1
    assert "epoch 2/4" not in screen.getvalue() and "11/24" not in screen.getvalue()


def drawn(screen: io.StringIO, pattern: str) -> bool:
    """Whether it is on the screen before long: bars are drawn ten times a second."""
    deadline = time.monotonic() + 30
    while not re.search(pattern, screen.getvalue()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return re.search(pattern, screen.getvalue()) is not None


# --- preflight ------------------------------------------------------------------------------------------------


def check(document: dict[str, Any], store: Path) -> None:
    check_study(Study(StudyConfig.model_validate(document), open_store(store, create=True)))


def test_a_training_that_can_be_done_passes(tmp_path: Path) -> None:
    check({**CLASSIFIER, "methods": [], "metrics": []}, tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model": {"create_args": {"num_classes": 2}}},
            r"dataset: expected pictures .* from 0 to 1, got \d",
        ),
        ({"training": {"kind": "ia"}}, r"training\.kind: model\.name: expected vitrine_ia, got resnet18"),
        ({"training": {"kind": "ea"}}, r"training\.kind: .*vitrine_ea"),
        (
            {"model": {"create_args": {"num_classes": 12, "in_chans": 1}}},
            r"training\.kind: expected a model and options that take pictures of 32 x 32, three colours, got from",
        ),
    ],
)
def test_trainings_that_cannot_be_done_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check({**config_with(CLASSIFIER, **changes), "methods": [], "metrics": []}, tmp_path / "store")


def test_test_pictures_without_a_logit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        from tests.conftest import picture

        picture(0).save(folder / name / "0.png")
    document = config_with(CLASSIFIER, training={"test": {"kind": "folder", "path": str(folder)}})
    document["model"] = {**CLASSIFIER["model"], "create_args": {"num_classes": 1}}
    with pytest.raises(UsageError, match=r"(dataset|training\.test): expected pictures with labels from 0 to 0"):
        check({**document, "methods": [], "metrics": []}, tmp_path / "store")


@pytest.fixture
def wrong_files(tmp_path: Path) -> dict[str, Path]:
    """Files that are no checkpoint of a trained IA."""
    model = load_classifier(StudyConfig().model.spec())
    about = {"config": {}, "model": {}, "weights": None}
    found = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "classifier")}
    found["plain"].write_bytes(b"no safetensors")
    save_trained(found["classifier"], model.module, {**about, "kind": "classifier"})
    return found


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", r"methods\.0: checkpoint: expected a file that `vitrine train` wrote, got .*plain"),
        ("classifier", r"methods\.0: checkpoint: expected one of kind ia, got kind classifier"),
    ],
)
def test_a_method_by_a_wrong_file_is_refused(
    tmp_path: Path, wrong_files: dict[str, Path], name: str, told: str
) -> None:
    methods = [{"name": "importance", "checkpoint": str(wrong_files[name])}]
    with pytest.raises(UsageError, match=told):
        check(config_with(TINY, methods=methods), tmp_path / "store")


def test_a_method_without_its_file_is_refused_when_the_config_is_read(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", config_with(TINY, methods=[{"name": "importance", "checkpoint": "no.file"}]))
    found = call("run", "c.yaml", "--store", "store", cwd=tmp_path)
    assert found.returncode == 2
    assert "methods.0" in found.stderr and "no.file" in found.stderr


def test_a_file_for_another_model_is_refused_with_both_digests(tmp_path: Path) -> None:
    from flows.preflight_training import check_files
    from xai_core.registry import methods

    model, path = load_classifier(StudyConfig().model.spec()), tmp_path / "one.safetensors"
    entry = methods.get("importance")
    about = {"kind": "ia", "config": {}, "model": {}, "weights": "0" * 64}
    save_trained(path, model.module, about)
    with pytest.raises(UsageError, match=rf"with weights {model_digest(model)}, got .* for {'0' * 64}"):
        check_files(model, entry, entry.options(checkpoint=str(path)))
    save_trained(path, model.module, {**about, "weights": model_digest(model)})
    check_files(model, entry, entry.options(checkpoint=str(path)))
