"""The questions at a report's end: each has an answer in the store, and belongs to a section of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage import sql
from storage.store import open_store
from tasks.config import StudyConfig
from tasks.report.queries import OF_IMPORTANCE, OF_MODEL, OF_TRAINING, Question, questions
from tests.conftest import TINY, TINY_IA, config_with

NOBODY = {"methods": [], "metrics": [], "concepts": {}, "model": TINY_IA}
TRAINED = {**NOBODY, "training": {"kind": "ia"}}
EVALUATED = {**NOBODY, "importance": {"networks": ["ia.safetensors"]}}
ASKED: dict[str, tuple[dict[str, Any], tuple[Question, ...]]] = {
    "a study": ({}, OF_MODEL),
    "a training": (TRAINED, OF_TRAINING),
    "an evaluation": (EVALUATED, OF_IMPORTANCE),
    "a study that trains": ({"training": {"kind": "classifier"}}, (*OF_MODEL, *OF_TRAINING)),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_report_asks_about_what_it_shows(name: str) -> None:
    changes, expected = ASKED[name]
    found = questions(StudyConfig.model_validate({**config_with(TINY), **changes}), "run-1")
    assert [one.words for one in found] == [one.words for one in expected]
    assert all("run_id = 'run-1'" in one.sql for one in found)


@pytest.mark.parametrize("question", [*OF_MODEL, *OF_TRAINING, *OF_IMPORTANCE], ids=lambda one: one.words)
def test_every_question_can_be_asked(question: Question, tmp_path: Path) -> None:
    assert sql.query(open_store(tmp_path, create=True), question.sql.format(run_id="none")).num_rows == 0
