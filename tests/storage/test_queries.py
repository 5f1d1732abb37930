"""The worked queries of the documentation, each run against a real study."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage import sql
from storage.views import VIEWS
from tests.conftest import REPOSITORY, TINY, Ran

PAGE = (REPOSITORY / "docs" / "queries.md").read_text()
WORKED = re.compile(r"^### \d+\. (.+?)\n.*?^```sql\n(.+?)^```\n\n^```\n(.+?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Worked:
    """A query of the page with the columns of its answer there."""

    title: str
    text: str
    columns: tuple[str, ...]


QUERIES = [
    Worked(title, text, tuple(re.split(r"\s{2,}", answer.splitlines()[0].strip())))
    for title, text, answer in WORKED.findall(PAGE)
]


@pytest.fixture(scope="module")
def ran(run_chain: Callable[[dict[str, Any], Path], Ran], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_chain(TINY, tmp_path_factory.mktemp("queries") / "store")


def test_the_page_works_ten_queries() -> None:
    assert len(QUERIES) == 10
    assert PAGE.count("```sql") == 10


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.title)
def test_a_query_of_the_page_answers_with_the_columns_shown(ran: Ran, query: Worked) -> None:
    found = sql.query(ran.store, query.text)
    assert tuple(found.column_names) == query.columns
    assert found.num_rows >= 1


def test_the_page_describes_every_view() -> None:
    assert all(f"| `{view.name}` |" in PAGE for view in VIEWS)


def test_the_leaderboard_is_the_one_that_a_run_prints(ran: Ran) -> None:
    from tasks.leaderboard import leaderboard

    printed = {(one.method, one.metric): one for one in leaderboard(ran.store, ran.run_id)}
    rows = ran.sql("from leaderboard")
    assert len(rows) == len(printed) == 6
    for row in rows:
        one = printed[row["method"], row["metric"]]
        assert row["mean"] == pytest.approx(one.mean)
        assert (row["images"], row["nulls"], row["higher_is_better"]) == (
            one.count,
            one.nulls,
            one.higher_is_better,
        )
