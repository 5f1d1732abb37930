"""The command line: exit codes, messages and output of real processes on real stores."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.conftest import TINY, config_with, write_folder
from tests.flows.command import VITRINE, call, commits, executions, parsed, vitrine, write_config
from xai_core.demo_models import weights_path
from xai_core.synthetic import render

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tiny study's config, a picture and its own store."""
    folder = tmp_path_factory.mktemp("cli")
    write_config(folder / "tiny.yaml", TINY)
    return folder


@pytest.fixture(scope="module")
def first(place: Path, prefect_api: str) -> subprocess.CompletedProcess[str]:
    """The tiny study run by the command, with real Dask workers and the session's Prefect server."""
    return vitrine("run", "tiny.yaml", "--store", "store", cwd=place)


def test_a_run_completes_and_says_where_its_report_is(
    place: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 0, first.stderr[-3000:]
    assert "leaderboard" in first.stdout
    report = place / next(line.split()[-1] for line in first.stdout.splitlines() if line.startswith("report"))
    assert report.read_text().lstrip().startswith("<!")
    assert executions(first.stderr) == 33


def test_progress_is_lines_of_plain_text_where_nobody_watches(first: subprocess.CompletedProcess[str]) -> None:
    assert ESCAPE not in first.stdout + first.stderr
    assert "\r" not in first.stderr
    lines = first.stderr.splitlines()
    assert "attribute: 9 units, 36 images" in lines
    assert any(line.startswith("attribute: 9 run, 0 done before, ") for line in lines)


def test_a_second_run_has_nothing_to_do_and_starts_no_server(
    place: Path, first: subprocess.CompletedProcess[str]
) -> None:
    before = commits(place / "store")
    again = vitrine("run", "tiny.yaml", "--store", "store", cwd=place, server=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "nothing to do: everything was done before" in again.stdout
    assert executions(again.stderr) == 0
    assert commits(place / "store") == before
    assert not (place / "store" / "prefect").exists() or not list((place / "store" / "prefect").iterdir())


def test_prefect_shows_a_task_a_stage_and_the_leaderboard(
    first: subprocess.CompletedProcess[str], prefect_api: str
) -> None:
    stages = ["manifest", "predict", "parts", "pfv", "dictionary", "exemplars", "attribute", "metrics", "report"]
    run_id = next(line.split()[1] for line in first.stdout.splitlines() if line.startswith("run "))
    (flow_run,) = asked(prefect_api, "flow_runs", flow_runs={"name": {"any_": [run_id]}})
    assert flow_run["state_type"] == "COMPLETED"
    mine = {"flow_run_id": {"any_": [flow_run["id"]]}}
    tasks = asked(prefect_api, "task_runs", task_runs=mine)
    assert sorted(task["name"].rsplit("-", 1)[0] for task in tasks) == sorted(stages)
    artifacts = {one["key"]: one for one in asked(prefect_api, "artifacts", artifacts=mine)}
    assert set(artifacts) == {*stages, "leaderboard"}
    assert all(artifacts[stage]["data"] == 100.0 for stage in stages)
    assert r"kl\_hessian" in artifacts["leaderboard"]["data"]


def asked(url: str, what: str, **filters: object) -> list[dict]:
    """What the Prefect API holds of a kind."""
    request = urllib.request.Request(
        f"{url}/{what}/filter",
        data=json.dumps(filters).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


QUERY = "select method, metric, count(*) as n from metrics group by all order by all"
ASKED: dict[str, tuple[object, ...]] = {
    "plan": ("plan", "tiny.yaml", "--store", "store"),
    "plan of a change": ("plan", "tiny.yaml", "--store", "store", "--set", "parts.k=2"),
    "status": ("status", "--store", "store"),
    "verify": ("verify", "--store", "store"),
    "sql table": ("sql", QUERY, "--store", "store"),
    "sql csv": ("sql", QUERY, "--store", "store", "--format", "csv"),
    "sql json": ("sql", QUERY, "--store", "store", "--format", "json"),
    "sql parquet": ("sql", QUERY, "--store", "store", "--format", "parquet", "-o", "rows.parquet"),
    "sql tables": ("sql", "--tables", "--store", "store"),
    "sql nested csv": ("sql", "select [1, 2] as a", "--store", "store", "--format", "csv"),
    "sql wrong": ("sql", "select nonsense", "--store", "store"),
    "sql writing": ("sql", "copy (select 1) to 'stolen.csv'", "--store", "store"),
    "report": ("report", "--store", "store", "-o", "study.html"),
    "report of no run": ("report", "--store", "store", "--run", "tinny"),
    "report into no folder": ("report", "--store", "store", "-o", "no/such/folder.html"),
    "explain": (
        "explain",
        "one.png",
        "--model",
        "vitrine_demo_vit",
        "--method",
        "grad_cam",
        "-o",
        "one-sheet.png",
    ),
    "explain two": ("explain", "one.png", "two.png", "--config", "tiny.yaml", "-o", "both.png"),
    "explain no picture": ("explain", "tiny.yaml", "--model", "vitrine_demo_vit"),
    "list methods": ("list", "methods", "--format", "json"),
    "list metrics": ("list", "metrics", "--format", "json"),
    "list parts": ("list", "parts", "--format", "json"),
    "list extractors": ("list", "extractors", "--format", "json"),
    "list models": ("list", "models", "vitrine_*", "--format", "json"),
    "status of no store": ("status", "--store", "nowhere"),
    "plan in a taken folder": ("plan", "tiny.yaml", "--store", "."),
}


@pytest.fixture(scope="module")
def answers(place: Path, first: subprocess.CompletedProcess[str]) -> dict[str, subprocess.CompletedProcess[str]]:
    """What every reading command said about the finished store."""
    for index, name in enumerate(("one.png", "two.png")):
        Image.fromarray(render(1, index).image).save(place / name)
    return {name: call(*arguments, cwd=place) for name, arguments in ASKED.items()}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("sql wrong", 2, r"error: .*nonsense"),
        ("sql writing", 2, "error: "),
        ("sql nested csv", 2, "error: --format csv: "),
        ("report of no run", 2, "--run: expected a run of store, got 'tinny'; did you mean 'tiny-"),
        ("report into no folder", 1, "failed: .*no/such/folder.html"),
        ("explain no picture", 2, "error: tiny.yaml: expected a picture"),
        ("status of no store", 2, "error: --store: expected a store in nowhere, found none"),
        ("plan in a taken folder", 2, "error: --store: .* holds other things"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    answers: dict[str, subprocess.CompletedProcess[str]], name: str, code: int, message: str
) -> None:
    found = answers[name]
    assert found.returncode == code, found.stderr[-2000:]
    assert_matches(message, found.stderr)
    assert "Traceback" not in found.stderr


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text, re.DOTALL), f"expected {pattern!r} in {text[-2000:]!r}"


def test_all_other_commands_succeed_without_escape_codes(
    answers: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    refused = {"sql wrong", "sql writing", "sql nested csv"} | {
        name for name in ASKED if " no " in name or " of no" in name or "taken" in name
    }
    for name, found in answers.items():
        if name not in refused:
            assert found.returncode == 0, (name, found.stderr[-2000:])
        assert ESCAPE not in found.stdout + found.stderr, name


def test_plan_tells_what_would_run_and_why(answers: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert "nothing to do" in answers["plan"].stdout
    changed = answers["plan of a change"].stdout
    assert "config.k: 4 -> 2" in changed
    assert "16 of 33 units would run" in changed


def test_status_and_verify_count_what_is_committed(answers: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert "complete" in answers["status"].stdout
    assert "33/33" in answers["status"].stdout
    assert_matches(r"^\d+ objects are whole \(5\.\d MB\)$", answers["verify"].stdout)


EXPECTED = [
    {"method": method, "metric": metric, "n": 12}
    for method in ("grad_cam", "integrated_gradients[steps=2]", "kl_hessian")
    for metric in ("insertion[steps=3]", "p_deletion")
]


def test_sql_answers_in_every_format(place: Path, answers: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert parsed(answers["sql json"].stdout) == EXPECTED
    rows = [{**row, "n": int(row["n"])} for row in csv.DictReader(io.StringIO(answers["sql csv"].stdout))]
    assert rows == EXPECTED
    assert pq.read_table(place / "rows.parquet").to_pylist() == EXPECTED
    table = answers["sql table"].stdout
    assert all(row["method"] in table for row in EXPECTED)
    assert "metrics" in answers["sql tables"].stdout.split()
    assert not (place / "stolen.csv").exists()


def test_report_is_copied(place: Path, answers: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert answers["report"].stdout.strip() == "study.html"
    page = (place / "study.html").read_text()
    assert "kl_hessian" in page


def test_explain_writes_a_picture_and_names_classes(
    place: Path, answers: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    with Image.open(place / "one-sheet.png") as sheet:
        assert min(sheet.size) > 200
    assert "%" in answers["explain"].stdout
    assert "grad_cam: part" in answers["explain"].stdout
    assert (place / "both-one.png").is_file()
    assert (place / "both-two.png").is_file()


def test_list_gives_json(answers: dict[str, subprocess.CompletedProcess[str]]) -> None:
    names = {
        kind: [one["name"] for one in parsed(answers[f"list {kind}"].stdout)]
        for kind in ("methods", "metrics", "parts", "extractors", "models")
    }
    assert {"grad_cam", "integrated_gradients", "kl_hessian"} <= set(names["methods"])
    assert {"insertion", "deletion", "aopc", "p_insertion", "p_deletion", "p_aopc"} <= set(names["metrics"])
    assert {"tokens", "spectral", "slic", "grid", "masks"} <= set(names["parts"])
    assert {"bisecting_kmeans", "sae"} <= set(names["extractors"])
    inherent = ["vitrine_ea", "vitrine_ia", "vitrine_pa"]
    assert names["models"] == ["vitrine_demo_resnet", "vitrine_demo_vit", *inherent]


def test_verify_finds_damage_repairs_it_and_a_run_heals_the_store(
    place: Path, first: subprocess.CompletedProcess[str], answers: object
) -> None:
    store = place / "store"
    before = commits(store)
    table = next((store / "tables" / "metrics").glob("*.parquet"))
    content = table.read_bytes()
    table.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    found = call("verify", "--store", "store", cwd=place)
    assert found.returncode == 1
    assert f"flipped: tables/metrics/{table.name}" in found.stdout
    repaired = call("verify", "--store", "store", "--repair", cwd=place)
    assert repaired.returncode == 0
    assert len(before) - len(commits(store)) == 1
    healed = vitrine("run", "tiny.yaml", "--store", "store", cwd=place)
    assert healed.returncode == 0, healed.stderr[-3000:]
    assert executions(healed.stderr) == 1
    assert table.read_bytes() == content
    assert commits(store).keys() == before.keys()


def test_a_broken_picture_gives_exit_code_3(tmp_path: Path, prefect_api: str) -> None:
    folder = write_folder(tmp_path / "images", {"a": 3, "b": 2})
    (folder / "b" / "broken.png").write_bytes(b"not a picture")
    study = config_with(
        TINY,
        dataset={"kind": "folder", "path": "images", "images": 1},
        methods=["grad_cam"],
        concepts={"layers": []},
        run={"max_bad_fraction": 0.5},
    )
    write_config(tmp_path / "study.yaml", study)
    found = vitrine("run", "study.yaml", cwd=tmp_path)
    assert found.returncode == 3, found.stderr[-3000:]
    assert "1 images quarantined" in found.stdout
    strict = vitrine("run", "study.yaml", "--set", "run.max_bad_fraction=0.0", cwd=tmp_path)
    assert strict.returncode == 1
    assert_matches("failed: stage manifest: 1 of 6 images were quarantined", strict.stderr)
    assert "resume with: vitrine run study.yaml --set run.max_bad_fraction=0.0" in strict.stderr


def _set(*pairs: str) -> tuple[str, ...]:
    return tuple(part for pair in pairs for part in ("--set", pair))


BAD_INPUT: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown key": (_set("run.shard_siz=3"), r"run\.shard_siz: unknown key; did you mean 'shard_size'"),
    "unknown method": (
        _set("methods=[grad_cm]"),
        r"methods\.0: unknown method 'grad_cm': did you mean 'grad_cam'",
    ),
    "unknown model": (
        _set("model.name=vitrine_demo_vti"),
        r"model\.name: unknown timm model .+'vitrine_demo_vit'",
    ),
    "missing layer": (
        _set("concepts.layers=[blocks.9]"),
        r"concepts\.layers: layer 'blocks\.9': expected a module of vitrine_demo_vit, got none .+'blocks\.",
    ),
    "missing layer of a method": (
        _set("methods=[{name: grad_cam, layer: blokcs.1}]"),
        r"methods\.0: method 'grad_cam' does not fit vitrine_demo_vit: layer 'blokcs\.1': expected a module",
    ),
    "misfitting checkpoint": (
        _set("model.checkpoint=resnet.safetensors"),
        r"model\.checkpoint: resnet\.safetensors does not fit the model: \d+ keys missing .+ unexpected",
    ),
    "pickle": (_set("model.checkpoint=w.pth"), r"model\.checkpoint: expected a \.safetensors file, got 'w\.pth'"),
    "renamed pickle": (_set("model.checkpoint=p.safetensors"), r"model\.checkpoint: expected safetensors content"),
    "empty folder": (
        _set("dataset={kind: folder, path: empty}"),
        r"dataset\.path: expected images .+ found none in .+empty",
    ),
    "no folder": (
        _set("dataset={kind: folder, path: nowhere}"),
        r"dataset\.path: expected a folder .+ got .+nowhere",
    ),
    "mask of another size": (
        _set("dataset={kind: folder, path: images, masks: masks}", "parts.parser=masks"),
        r"dataset\.masks: expected .+000\.png of size 40 x 32 like its image, got 9 x 9",
    ),
    "labels that are no classes": (
        _set("dataset={kind: folder, path: images}", "target=label"),
        r"target: 'label' needs labels that are the model's \d+ classes",
    ),
    "no such scheduler": (
        _set("compute.scheduler=nonsense://x"),
        r"compute\.scheduler: no Dask scheduler at nonsense",
    ),
    "no such config": ((), "config: expected a YAML file, got no file at missing.yaml"),
}


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory, prefect_api: str
) -> tuple[Path, dict[str, subprocess.CompletedProcess[str]]]:
    """What every bad request was answered."""
    folder = tmp_path_factory.mktemp("bad")
    write_config(folder / "tiny.yaml", TINY)
    (folder / "empty" / "class").mkdir(parents=True)
    write_folder(folder / "images", {"a": 1, "b": 1})
    for name in ("a", "b"):
        (folder / "masks" / name).mkdir(parents=True)
        Image.fromarray(np.ones((9, 9), np.uint8)).save(folder / "masks" / name / "000.png")
    (folder / "resnet.safetensors").write_bytes(weights_path("vitrine_demo_resnet").read_bytes())
    for name in ("w.pth", "p.safetensors"):
        torch.save({"weight": torch.zeros(2)}, folder / name)
    commands = {
        name: ("run", "missing.yaml" if "config" in name else "tiny.yaml", "--store", f"store-{index}", *arguments)
        for index, (name, (arguments, _)) in enumerate(BAD_INPUT.items())
    }
    return folder, {name: call(*arguments, cwd=folder) for name, arguments in commands.items()}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_any_work(
    refusals: tuple[Path, dict[str, subprocess.CompletedProcess[str]]], name: str
) -> None:
    folder, answered = refusals
    found = answered[name]
    assert found.returncode == 2, found.stderr[-3000:]
    assert found.stderr.startswith("error: ")
    assert_matches(BAD_INPUT[name][1], found.stderr)
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    store = folder / f"store-{list(BAD_INPUT).index(name)}"
    assert commits(store) == {}


@pytest.mark.parametrize("listed", ["methods", "metrics"])
def test_a_reader_that_stops_reading_is_no_failure(tmp_path: Path, listed: str) -> None:
    command = f"{VITRINE} list {listed} --format json; echo $? >&2"
    # The reader is gone before anything is printed.
    piped = ["bash", "-c", f"({command}) | true"]
    found = subprocess.run(piped, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert found.stderr.split() == ["0"]


def test_bad_input_ends_the_process_with_exit_code_2(tmp_path: Path) -> None:
    found = vitrine("run", "--store", "store", "--set", "methods=[grad_cm]", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr == (
        "error: methods.0: unknown method 'grad_cm': did you mean 'grad_cam' or 'xgrad_cam' or 'grad_cam_pp'?\n"
    )


def test_help_shows_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = call("run", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "configs/imagenet-sample.yaml --limit 64" in shown.stdout
