"""``vitrine diagnose`` as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import TINY, Ran, config_with
from tests.flows.command import vitrine
from xai_core.synthetic import render

STUDY = config_with(
    TINY,
    methods=["grad_cam"],
    metrics=[],
    concepts={"layers": ["blocks.1", "blocks.2"], "per_image": 4, "receptive_fields": None},
)


@pytest.fixture(scope="module")
def place(run_chain: Callable[[dict[str, Any], Path], Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that has dictionaries, and a picture."""
    folder = tmp_path_factory.mktemp("diagnose")
    run_chain(STUDY, folder / "vitrine-store")
    Image.fromarray(render(1, 30).image).save(folder / "toy.png")
    return folder


def test_a_picture_is_diagnosed_by_a_runs_dictionaries(place: Path) -> None:
    found = vitrine("diagnose", "toy.png", "--classes", "0,rolling bird", "--attack", "4", cwd=place)
    assert found.returncode == 0, found.stderr[-2000:]
    page, *lines = found.stdout.splitlines()
    assert page == "diagnosis.html"
    assert (place / page).read_text().startswith("<!doctype html>")
    assert any(line.strip().startswith("rolling bird: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("toy.png", "--classes", "0,rolling brid"), "--classes: expected a class of vitrine_demo_vit"),
        (("toy.png", "--classes", "1,1"), "--classes: expected different classes"),
        (("toy.png", "--classes", "0,1", "--towards", "2"), "--towards: nothing reads it without --attack"),
        (("none.png", "--classes", "0,1"), "none.png: expected a picture"),
        (("toy.png", "--classes", "0,1", "--extractor", "sae"), "--extractor: expected one of run"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(place: Path, arguments: tuple[str, ...], told: str) -> None:
    found = vitrine("diagnose", *arguments, "-o", "refused.html", cwd=place)
    assert found.returncode == 2
    assert told in found.stderr
    assert not (place / "refused.html").exists()
