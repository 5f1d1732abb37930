"""Networks that weigh their patches by the command: a whole run, and what is refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.config import load_config
from flows.preflight import check_study
from storage.store import open_store
from tasks.sources import open_source
from tasks.study import Study
from tests.conftest import write_folder
from tests.flows.command import call, commits, executions, parsed, vitrine, write_config
from tests.xai_core.inherent.small import built, saved
from xai_core.errors import UsageError
from xai_core.inherent.evaluation import THRESHOLDS
from xai_core.training import digest_of


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Eleven pictures of three classes, and networks with random weights."""
    write_folder(tmp_path / "images", {"apple": 5, "pear": 3, "plum": 3})
    saved(built("ia"), tmp_path / "ia.safetensors")
    saved(built("pa", threshold=0.4), tmp_path / "pa.safetensors", "pa")
    return tmp_path


def document(**importance: Any) -> dict[str, Any]:
    return {
        "dataset": {"kind": "folder", "path": "images"},
        "methods": [],
        "metrics": [],
        "importance": {"networks": ["ia.safetensors", "pa.safetensors"], **importance},
        "run": {"shard_size": 6, "max_bad_fraction": 0.2},
        "compute": {"workers": 1},
    }


def test_the_whole_way_by_the_command(place: Path, prefect_api: str) -> None:
    write_config(place / "study.yaml", document())
    done = vitrine("run", "study.yaml", "--store", "store", cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "importance: 4 run" in done.stderr
    assert not any(line.startswith(("predict", "parts")) for line in done.stderr.splitlines())
    query = (
        "select kind, direction, count(*) as n, count(distinct threshold) as thresholds from importance_accuracy "
        "group by all order by all"
    )
    found = parsed(call("sql", query, "--store", "store", "--format", "json", cwd=place).stdout)
    assert [tuple(row.values()) for row in found] == [
        (kind, direction, 11 * count, thresholds)
        for kind in ("ia", "pa")
        for direction, count, thresholds in (("deletion", 11, 11), ("insertion", 11, 11), ("own", 1, 0))
    ]
    before = commits(place / "store")
    again = call("run", "study.yaml", "--store", "store", cwd=place)
    assert again.returncode == 0 and executions(again.stderr) == 0
    assert commits(place / "store") == before
    one = f"importance.networks=[{place / 'ia.safetensors'}]"
    plan = call("plan", "study.yaml", "--store", "store", "--set", one, cwd=place)
    assert plan.returncode == 0
    assert "1 of 5 units would run" in plan.stdout


def test_paths_are_relative_to_the_config_and_those_of_set_to_the_folder(place: Path) -> None:
    (place / "a").mkdir()
    path = write_config(place / "a" / "c.yaml", document(networks=["../ia.safetensors", "b.safetensors"]))
    section = load_config(path).importance
    assert section is not None
    assert section.networks == (str(place / "ia.safetensors"), str(place / "a" / "b.safetensors"))
    assert section.thresholds == THRESHOLDS == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    given = load_config(path, ["importance.networks=[c.safetensors]"]).importance
    assert given is not None and given.networks == (str(Path.cwd() / "c.safetensors"),)


@pytest.mark.parametrize(
    ("importance", "told"),
    [
        ({"networks": []}, "importance.networks"),
        ({"networks": "ia.safetensors"}, "importance.networks: expected a list"),
        ({"networks": [7]}, "importance.networks.0"),
        ({"thresholds": [0.5, 1.5]}, "importance.thresholds.1"),
        ({"thresholds": [float("nan")]}, "importance.thresholds.0"),
        ({"thresholds": []}, "importance.thresholds"),
        ({"thresholds": [0.5, 0.2, 0.5]}, "expected each threshold once, got 0.5 more than once"),
        ({"threshold": [0.5]}, "importance.threshold: unknown key; did you mean 'thresholds'"),
    ],
)
def test_sections_that_mean_nothing_are_refused(place: Path, importance: dict[str, Any], told: str) -> None:
    path = write_config(place / "c.yaml", document(**importance))
    with pytest.raises(UsageError) as raised:
        load_config(path)
    assert told in str(raised.value)


def check(place: Path, networks: list[str], **changes: Any) -> None:
    open_source.cache_clear()
    config = load_config(write_config(place / "c.yaml", {**document(networks=networks), **changes}))
    check_study(Study(config, open_store(place / "store", create=True)))


def test_networks_that_fit_pass(place: Path) -> None:
    check(place, ["ia.safetensors", "pa.safetensors"])


def test_files_that_are_missing_foreign_or_named_twice_are_refused(place: Path) -> None:
    with pytest.raises(
        UsageError, match=r"importance\.networks\.1: checkpoint: expected a file, got none at .*no"
    ):
        check(place, ["ia.safetensors", "no.safetensors"])
    (place / "text.safetensors").write_text("no weights")
    with pytest.raises(UsageError, match=r"importance\.networks\.0: .*expected a file that `vitrine train` wrote"):
        check(place, ["text.safetensors"])
    shutil.copyfile(place / "ia.safetensors", place / "copy.safetensors")
    told = r"importance\.networks\.1: expected networks that differ, got .*copy.* content of .*ia\.s.*; remove"
    with pytest.raises(UsageError, match=told):
        check(place, ["ia.safetensors", "copy.safetensors"])


def test_networks_without_importance_or_with_other_weights_are_refused(place: Path) -> None:
    saved(built("pa"), place / "whole.safetensors", "pa")
    with pytest.raises(
        UsageError, match=r"importance\.networks\.0: .*PA\(p, 0\) has none: evaluate the IA itself"
    ):
        check(place, ["whole.safetensors"])
    wrong = built("ia")
    wrong.module.config = built("ia", embed_dim=7).module.config
    saved(wrong, place / "wrong.safetensors")
    with pytest.raises(UsageError, match=r"importance\.networks\.0: .*does not fit the model"):
        check(place, ["wrong.safetensors"])


def test_networks_of_other_classes_and_pictures_without_labels_are_refused(place: Path) -> None:
    saved(built("ia", num_classes=4), place / "four.safetensors")
    told = r"importance\.networks\.1: expected a network of the pictures' 3 classes .*got one of 4; .*classes"
    with pytest.raises(UsageError, match=told):
        check(place, ["ia.safetensors", "four.safetensors"])
    picture = (place / "images" / "apple" / "000.png").read_bytes()
    for labels, got in (([0, 3], "3 for"), (None, "None for")):
        columns = {"image": [{"bytes": picture, "path": ""}] * 2, **({"label": labels} if labels else {})}
        pq.write_table(pa.table(columns), place / "some.parquet")
        told = (
            rf"importance\.networks\.0: dataset: expected pictures with labels from 0 to 2, got {got}.*trained on"
        )
        with pytest.raises(UsageError, match=told):
            check(place, ["ia.safetensors"], dataset={"kind": "parquet", "path": "some.parquet"})


def test_masks_are_looked_at(place: Path) -> None:
    for path in sorted((place / "images").rglob("*.*")):
        mask = place / "masks" / path.relative_to(place / "images").with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ones((32, 40), np.uint8)).save(mask)
    truth = {"masks": "masks", "foreground": {"apple": [1], "pear": [1], "plum": [1]}}
    check(place, ["ia.safetensors"], truth=truth)
    with pytest.raises(UsageError, match=r"truth\.foreground: .*'pea': did you mean 'pear'"):
        check(place, ["ia.safetensors"], truth={**truth, "foreground": {"pea": [1]}})
    mask.unlink()
    with pytest.raises(UsageError, match=r"truth\.masks: expected a mask for every image"):
        check(place, ["ia.safetensors"], truth=truth)


def test_ids_are_those_of_the_files(place: Path) -> None:
    config = load_config(write_config(place / "c.yaml", document()))
    names = [network.id for network in Study(config, open_store(place / "store", create=True)).networks]
    assert names == [f"{kind}[{digest_of(place / f'{kind}.safetensors')[:12]}]" for kind in ("ia", "pa")]
