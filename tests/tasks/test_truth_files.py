"""Truth from mask files and boxes: what a study makes of them, and what is null and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.store import open_store
from tasks.config import StudyConfig, TruthConfig
from tasks.plan import Planner
from tasks.study import Study
from tasks.truth import NO_TRUTH
from tasks.truth_files import (
    NO_BOX,
    NO_BOX_OF_CLASS,
    NO_KNOWN_VALUE,
    NO_VALUE_OF_CLASS,
    Box,
    class_numbers,
    read_boxes,
    teller,
)
from tests.conftest import Ran, picture
from xai_core.errors import UsageError

Chain = Callable[[dict[str, Any], Path], Ran]
UNKNOWN = 255
SMALL: dict[str, Any] = {
    "name": "resnet10t",
    "pretrained": False,
    "create_args": {"num_classes": 3},
    "transform": {"input_size": [3, 64, 64], "crop_pct": 1.0},
}


def study_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "name": "files",
        "dataset": {"kind": "folder", "path": str(folder)},
        "model": SMALL,
        "target": "label",
        "parts": {"parser": "grid", "k": 4},
        "methods": ["gradient"],
        "metrics": ["pointing_game", {"name": "insertion", "steps": 2}],
        "run": {"shard_size": 4, "max_bad_fraction": 1.0},
    }
    return {**base, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures of three classes, 72 x 36, with masks like trimaps: object 1, rest 2, border 3."""
    for index in range(8):
        path = tmp_path / "images" / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index, width=72, height=36).save(path)
        write_mask(tmp_path / "masks" / path.relative_to(tmp_path / "images"), trimap())
    return tmp_path / "images"


def trimap(inside: int = 1, border: int = 3, outside: int = 2) -> np.ndarray:
    """The left half is the object, nine columns are its border."""
    values = np.full((36, 72), outside, np.uint8)
    values[:, :36] = inside
    values[:, 36:45] = border
    return values


def write_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def masks_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"truth": {"masks": str(folder.parent / "masks"), **more}}


def test_masks_are_read_through_the_images_geometry(run_chain: Chain, folder: Path, tmp_path: Path) -> None:
    found = run_chain(study_of(folder, **masks_of(folder, foreground=[1], ignore=[3])), tmp_path / "store")
    assert found.quarantined == 0
    masks = found.store.xarray("truth/mask", found.run_id)
    # The middle 36 x 36 are seen at 64 x 64: 18 columns of the object, 9 of the border, 9 of the rest.
    expected = np.repeat([1, UNKNOWN, 0], [32, 16, 16])
    for image_id in range(8):
        assert (masks.sel(image=image_id).values == expected).all()
    rows = found.sql("select distinct inside, outside, unknown, reason from true_masks")
    assert rows == [{"inside": 64 * 32, "outside": 64 * 16, "unknown": 64 * 16, "reason": None}]
    values = found.sql("select value, reason from metrics where metric = 'pointing_game'")
    assert len(values) == 8
    assert all(row["value"] in (0, 1) for row in values)
    assert found.sql("select count(*) as n from true_parts") == [{"n": 0}]


def test_a_mask_that_cannot_be_used_costs_only_the_metrics_that_read_it(
    run_chain: Chain, folder: Path, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    (masks / "a" / "0.png").unlink()
    (masks / "b" / "1.png").write_bytes(b"no mask")
    write_mask(masks / "c" / "2.png", trimap()[:, :20])
    Image.fromarray(np.dstack([trimap()] * 3)).save(masks / "a" / "3.png")
    Image.fromarray(trimap().astype(np.uint16) * 300).save(masks / "b" / "4.png")
    write_mask(masks / "c" / "5.png", trimap(7, 8, 9))
    write_mask(masks / "a" / "6.png", trimap(2, 2, 2) * 0)
    found = run_chain(study_of(folder, **masks_of(folder, foreground=[1], ignore=[3])), tmp_path / "store")
    set_aside = {row["path"]: row for row in found.sql("select path, stage, error, message from quarantine")}
    assert {(row["stage"], row["error"]) for row in set_aside.values()} == {("truth", "SourceError")}
    for path, word in [
        ("a/0.png", "No such file"),
        ("b/1.png", "of no known format"),
        ("c/2.png", "expected 2.png of size 72 x 36 like its image, got 20 x 36"),
        ("a/3.png", "with one byte a pixel (mode 1, L, P), got mode RGB: convert it"),
        ("b/4.png", "got mode I;16: convert it"),
    ]:
        assert word in set_aside[path]["message"]
    assert len(set_aside) == 5
    rows = found.sql("select path, metric, value, reason from metrics join images using (run_id, image_id)")
    assert all(row["value"] is not None for row in rows if row["metric"] != "pointing_game")
    told = {row["path"]: row["reason"] for row in rows if row["metric"] == "pointing_game"}
    assert {path for path, reason in told.items() if reason == NO_TRUTH} == set(set_aside)
    assert told["c/5.png"] == NO_KNOWN_VALUE
    assert told["a/6.png"] == "the mask is empty"
    assert told["b/7.png"] is None
    reasons = found.sql("select path, reason from true_masks join images using (run_id, image_id) order by path")
    assert [(row["path"], row["reason"]) for row in reasons] == [
        ("a/6.png", None),
        ("b/7.png", None),
        ("c/5.png", NO_KNOWN_VALUE),
    ]


def test_every_mask_broken_is_no_reason_to_stop(run_chain: Chain, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "masks")
    found = run_chain(study_of(folder, **masks_of(folder)), tmp_path / "store")
    assert found.quarantined == 8
    rows = found.sql("select metric, reason, count(*) as n from metrics group by all order by all")
    assert rows == [
        {"metric": "insertion[steps=2]", "reason": None, "n": 8},
        {"metric": "pointing_game", "reason": NO_TRUTH, "n": 8},
    ]


def test_boxes_of_the_target_count_and_others_do_not(run_chain: Chain, folder: Path, tmp_path: Path) -> None:
    lines = [
        "label,path,x0,y0,x1,y1",
        # Labels are the numbers of the folders: a is 0, b is 1, c is 2.
        "a,a/0.png,18,0,36,36",
        "0,a/3.png,18,0,27,36",
        "0,a/3.png,27,0,36,18.5",
        "1,a/3.png,36,0,54,36",
        "c,b/1.png,18,0,36,36",
        ",b/4.png,-10,-10,36,100",
        "who,c/2.png,1,1,2,2",
        "c,c/5.png,80,0,90,36",
        "c,elsewhere/9.png,0,0,1,1",
    ]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    found = run_chain(study_of(folder, truth={"boxes": str(tmp_path / "boxes.csv")}), tmp_path / "store")
    (bad,) = found.sql("select path, stage, message from quarantine")
    assert (bad["path"], bad["stage"]) == ("c/5.png", "truth")
    assert bad["message"] == "truth.boxes: expected boxes in pixels of the picture of 72 x 36, got 80, 0 to 90, 36"
    told = {
        row["path"]: (row["inside"], row["reason"])
        for row in found.sql("from true_masks join images using (run_id, image_id)")
    }
    full = 64 * 32
    assert told == {
        "a/0.png": (full, None),
        "a/3.png": (full // 2 + 32 * 16, None),
        "a/6.png": (0, NO_BOX),
        "b/1.png": (0, NO_BOX_OF_CLASS),
        "b/4.png": (full, None),
        "b/7.png": (0, NO_BOX),
        "c/2.png": (0, NO_BOX_OF_CLASS),
    }
    reasons = found.sql(
        "select path, reason from metrics join images using (run_id, image_id) where metric = 'pointing_game'"
    )
    expected = {path: reason for path, (_, reason) in told.items()} | {"c/5.png": NO_TRUTH}
    assert {row["path"]: row["reason"] for row in reasons} == expected


def test_what_makes_it_run_again(run_chain: Chain, folder: Path, tmp_path: Path) -> None:
    document = study_of(folder, **masks_of(folder, foreground=[1], ignore=[3]))
    assert run_chain(document, tmp_path / "store").counts["truth"] == 2
    other = study_of(folder, **masks_of(folder, foreground=[1, 3]))
    assert due(other, tmp_path / "store")["truth"].startswith("config: config.foreground: [1] -> [1, 3]")
    write_mask(tmp_path / "masks" / "a" / "0.png", trimap(2, 2, 1)[:, ::-1].copy())
    assert due(document, tmp_path / "store").keys() == {"truth", "metrics", "report"}
    assert "config.files" in due(document, tmp_path / "store")["truth"]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("path,x0,y0,x1,y1\na/0.png,0,0,9,9")
    assert due(study_of(folder, truth={"boxes": str(boxes)}), tmp_path / "store").keys() == {
        "truth",
        "metrics",
        "report",
    }


def due(document: dict[str, Any], root: Path) -> dict[str, str]:
    planned = Planner(Study(StudyConfig.model_validate(document), open_store(root))).all()
    return {one.unit.stage: f"{one.reason}: {one.detail}" for one in planned if one.reason is not None}


def told_of(truth: dict[str, Any], values: list[int], target: int = 0) -> tuple[list[int], str | None]:
    """What is told of a mask of one row of values."""
    with TemporaryDirectory() as folder:
        write_mask(Path(folder) / "a.png", np.array([values], np.uint8))
        tell = teller(TruthConfig(masks=folder, **truth), ("cat", "dog", "crane", "crane"), None)
        told = tell("a.jpg", (len(values), 1), target)
    return told.mask[0].tolist(), told.reason


BY_CLASS = {"cat": [17], 1: [18, 20]}


@pytest.mark.parametrize(
    ("truth", "target", "values", "expected", "reason"),
    [
        ({}, 0, [0, 1, 255], [0, 1, 1], None),
        ({"ignore": [255]}, 0, [0, 1, 255], [0, 1, UNKNOWN], None),
        ({"ignore": [0]}, 0, [0, 1], [UNKNOWN, 1], None),
        ({"foreground": [0]}, 0, [0, 1], [1, 0], None),
        ({"foreground": [1], "ignore": [3]}, 0, [1, 2, 3], [1, 0, UNKNOWN], None),
        ({"foreground": [1], "ignore": [3]}, 0, [2, 2, 0], [0, 0, 0], None),
        ({"foreground": [1], "ignore": [3]}, 0, [2, 2, 7], [UNKNOWN] * 3, NO_KNOWN_VALUE),
        ({"foreground": BY_CLASS}, 0, [17, 18, 0], [1, 0, 0], None),
        ({"foreground": BY_CLASS}, 1, [17, 18, 20], [0, 1, 1], None),
        ({"foreground": BY_CLASS}, 2, [17, 18, 20], [UNKNOWN] * 3, NO_VALUE_OF_CLASS),
        ({"foreground": BY_CLASS}, 1, [17, 17, 0], [0, 0, 0], None),
    ],
)
def test_mask_values_mean_what_the_config_says(
    truth: dict[str, Any], target: int, values: list[int], expected: list[int], reason: str | None
) -> None:
    assert told_of(truth, values, target) == (expected, reason)


def test_masks_of_one_bit_and_with_a_palette_are_their_values(tmp_path: Path) -> None:
    tell = teller(TruthConfig(masks=str(tmp_path)), (), None)
    bits = np.array([[True, False]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert tell("a.jpg", (2, 1), 0).mask.tolist() == [[1, 0]]
    coloured = Image.fromarray(np.array([[2, 0]], np.uint8), "P")
    coloured.putpalette([255, 255, 255, 9, 9, 9, 0, 0, 0])
    coloured.save(tmp_path / "a.png")
    assert tell("a.jpg", (2, 1), 0).mask.tolist() == [[1, 0]]


def test_classes_go_by_name_or_number_unless_two_have_the_name() -> None:
    names = ("cat", "1", "crane", "crane")
    assert class_numbers(["cat", "0", "1", "2", "crane", "4", "Cat"], names) == {"cat": 0, "0": 0, "1": 1, "2": 2}
    with pytest.raises(
        UsageError, match=r"truth\.foreground: .+ 4 classes, got 'crane': two classes have that name, so"
    ):
        teller(TruthConfig(masks="x", foreground={"crane": [1]}), names, None)
    with pytest.raises(UsageError, match=r"truth\.foreground: expected each class once, got 'cat' and '0'"):
        teller(TruthConfig(masks="x", foreground={"cat": [1], 0: [2]}), names, None)


def test_a_box_holds_the_pixels_whose_centres_it_holds() -> None:
    assert Box(1, 0, 3, 1).inside((4, 2)).tolist() == [[False, True, True, False], [False] * 4]
    assert Box(0.5, 0.5, 1.5, 1.5).inside((3, 2)).tolist() == [[True, False, False], [False, False, False]]
    assert Box(-9, -9, 99, 99).inside((3, 2)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected a CSV file at .+ No such file"),
        (b"\xff\xfe", r"expected a CSV file at"),
        (b"", r"expected the columns path, x0, y0, x1, y1 .+ got none named path, x0, y0, x1, y1"),
        (b"path,x0,y0,x1\na,1,2,3", r"got none named y1"),
        (b"path,x0,y0,x1,y1\na,1,2,3", r"in line 2, got \['1', '2', '3', None\]"),
        (b"path,x0,y0,x1,y1\na,1,2,3,4\nb,1,2,x,4", r"x0 < x1 and y0 < y1 in line 3, got \['1', '2', 'x', '4'\]"),
        (b"path,x0,y0,x1,y1\na,5,2,3,4", r"in line 2"),
        (b"path,x0,y0,x1,y1\na,nan,2,3,4", r"in line 2"),
        (b"path,x0,y0,x1,y1\na,0,2,inf,4", r"in line 2"),
    ],
)
def test_a_table_that_is_none_of_boxes_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"truth\.boxes: .*{message}"):
        read_boxes(str(path), message)


@pytest.mark.shared
def test_photographs_with_trimaps(run_chain: Chain, shared_data: Path, tmp_path: Path) -> None:
    """A trained model looks at the animal: the heat lies on it more than its area would give."""
    document = {
        "name": "pets",
        "dataset": {"kind": "folder", "path": str(shared_data / "pets" / "images"), "limit": 8},
        "model": {
            "name": "deit_tiny_patch16_224",
            "checkpoint": str(shared_data / "models" / "deit_tiny_patch16_224.safetensors"),
        },
        "truth": {"masks": str(shared_data / "pets" / "trimaps"), "foreground": [1], "ignore": [3]},
        "parts": {"parser": "grid", "k": 4},
        "methods": ["grad_cam"],
        "metrics": ["attribution_localisation", "pointing_game"],
        "run": {"shard_size": 8, "batch_size": 4},
    }
    found = run_chain(document, tmp_path / "store")
    assert found.quarantined == 0
    (areas,) = found.sql(
        "select count(*) as n, min(inside) as least, min(unknown) as border, "
        "avg(inside / (inside + outside)) as share, min(inside + outside + unknown) as pixels from true_masks"
    )
    assert (areas["n"], areas["pixels"]) == (8, 224 * 224)
    assert areas["least"] > 0 and areas["border"] > 0
    (values,) = found.sql("select avg(value) as mean, count(value) as n from metrics where metric like 'attr%'")
    assert values["n"] == 8
    assert values["mean"] > areas["share"]


@pytest.mark.shared
def test_photographs_with_category_ids(run_chain: Chain, shared_data: Path, tmp_path: Path) -> None:
    """COCO's category ids, by ImageNet class: what has no category is null, with its reason."""
    names = ["000000000285", "000000000632", "000000000724"]
    for name in names:
        for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
            path = tmp_path / kind / "all" / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(shared_data / "coco" / kind / f"{name}{suffix}")
    document = {
        "name": "coco",
        "dataset": {"kind": "folder", "path": str(tmp_path / "images")},
        "model": {
            "name": "deit_tiny_patch16_224",
            "checkpoint": str(shared_data / "models" / "deit_tiny_patch16_224.safetensors"),
        },
        "truth": {"masks": str(tmp_path / "masks"), "foreground": {"brown bear, bruin, Ursus arctos": [23]}},
        "parts": {"parser": "grid", "k": 4},
        "methods": ["grad_cam"],
        "metrics": ["pointing_game"],
        "run": {"shard_size": 8},
    }
    found = run_chain(document, tmp_path / "store")
    rows = found.sql(
        "select path, target_name, inside, reason from true_masks join images using (run_id, image_id)"
    )
    told = {row["path"]: row for row in rows}
    bear = told.pop("all/000000000285.jpg")
    assert bear["target_name"].startswith("brown bear") and bear["inside"] > 5000 and bear["reason"] is None
    assert {row["reason"] for row in told.values()} == {NO_VALUE_OF_CLASS}
