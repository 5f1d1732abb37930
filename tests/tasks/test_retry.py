"""Trying again what was set aside: the unit, and whatever rests on it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.store import open_store
from storage.verify import verify_store
from tasks.config import StudyConfig
from tasks.plan import Planner
from tasks.study import Study
from tests.conftest import Ran
from tests.flows.command import call
from xai_core.models import Classifier
from xai_core.registry import NoOptions, methods

CONFIG: dict[str, Any] = {
    "name": "again",
    "dataset": {"kind": "demo", "images": 6},
    "parts": {"parser": "grid", "k": 4},
    "methods": ["grad_cam", "shaky"],
    "metrics": ["p_deletion"],
    "run": {"shard_size": 3, "batch_size": 3, "max_bad_fraction": 1},
}


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Path]:
    """While this file is there, the method ``shaky`` gives NaN for the first image of a batch."""
    flag = tmp_path / "trouble"
    flag.touch()

    def shaky(model: Classifier, images: Tensor, targets: Tensor, options: object, batch_size: int) -> Tensor:
        maps = images.mean(dim=1)
        if flag.exists():
            maps[0] = torch.nan
        return maps

    methods.register("shaky", options=NoOptions)(shaky)
    try:
        yield flag
    finally:
        del methods._entries["shaky"]


def set_aside(ran: Ran) -> list[tuple[int, str, int]]:
    rows = ran.sql("select image_id, method, attempt from quarantine order by image_id")
    return [(row["image_id"], row["method"], row["attempt"]) for row in rows]


def test_what_was_set_aside_is_tried_again_when_asked_and_only_then(
    run_chain: Callable[..., Ran], trouble: Path, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    first = run_chain(CONFIG, root)
    assert set_aside(first) == [(0, "shaky", 1), (3, "shaky", 1)]
    assert run_chain(CONFIG, root).executed == ()

    # The trouble is still there: the second attempt says so.
    for _ in range(2):
        told = call("quarantine", "--retry", "--store", root, cwd=tmp_path)
        assert told.stdout == "2 units will be tried again: run the study's config again\n"
    planned = Planner(Study(StudyConfig.model_validate(CONFIG), open_store(root))).all()
    assert {(one.unit.variant, one.reason, one.detail) for one in planned if one.unit.stage == "attribute"} == {
        ("grad_cam", None, ""),
        ("shaky", "retry", "attempt: null -> 2"),
    }
    second = run_chain(CONFIG, root)
    assert second.counts == {"attribute": 2, "metrics": 2, "report": 1}
    assert set_aside(second) == [(0, "shaky", 2), (3, "shaky", 2)]

    trouble.unlink()
    assert run_chain(CONFIG, root).executed == ()
    call("quarantine", "--retry", "--store", root, cwd=tmp_path)
    third = run_chain(CONFIG, root)
    assert third.counts == {"attribute": 2, "metrics": 2, "report": 1}
    assert set_aside(third) == []
    assert third.sql("select count(*) as n from metrics where method = 'shaky'") == [{"n": 6}]
    assert call("quarantine", "--retry", "--store", root, cwd=tmp_path).stdout.startswith("nothing is quarantined")
    assert verify_store(third.store).damage == ()


def test_a_run_without_that_history_gives_the_same_rows(
    run_chain: Callable[..., Ran], trouble: Path, tmp_path: Path
) -> None:
    """Another attempt has another key, and the same results."""
    shaken = run_chain(CONFIG, tmp_path / "shaken")
    call("quarantine", "--retry", "--store", tmp_path / "shaken", "--run", shaken.run_id, cwd=tmp_path)
    trouble.unlink()
    again, clean = run_chain(CONFIG, tmp_path / "shaken"), run_chain(CONFIG, tmp_path / "clean")
    rows = "select image_id, method, metric, value from metrics order by all"
    assert again.sql(rows) == clean.sql(rows)
