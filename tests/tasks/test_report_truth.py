"""The report's table of which metrics agree with the truth: scipy's numbers, where they mean something."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from storage.commits import Unit
from tasks.measurements import Measurements
from tasks.report.truth import Agreement, signed, truth_table
from tests.conftest import TINY, Ran, config_with

METHODS = ("one", "two", "three", "four")


def measured(**values: np.ndarray) -> Measurements:
    return Measurements(METHODS, tuple(values), values)


def drawn(seed: int, images: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, len(METHODS)))


def test_correlations_are_scipys_over_the_images_that_have_both() -> None:
    truth, aopc, deletion = drawn(0), drawn(1), drawn(2)
    aopc[3:9, 1], truth[5:20, 2] = np.nan, np.nan
    deletion[:, 0] = -3 * truth[:, 0]
    table = truth_table(measured(aopc=aopc, deletion=deletion, true_effect_rank=truth))
    assert table is not None
    rows = {row.metric: row for row in table.rows}
    for name, merit in (("aopc", aopc), ("deletion", -deletion)):
        for number, cell in enumerate(rows[name].cells):
            both = np.isfinite(merit[:, number]) & np.isfinite(truth[:, number])
            expected = scipy.stats.spearmanr(merit[both, number], truth[both, number]).statistic
            assert cell is not None
            assert (cell.count, cell.correlation) == (both.sum(), pytest.approx(expected, abs=1e-12))
        of_means = scipy.stats.spearmanr(np.nanmean(merit, axis=0), np.nanmean(truth, axis=0)).statistic
        over = rows[name].over_methods
        assert over is not None and (over.count, over.correlation) == (4, pytest.approx(of_means))
        assert rows[name].mean == pytest.approx(np.mean([cell.correlation for cell in rows[name].cells if cell]))
    # Deletion falls as the method gets better: turned, it agrees wholly with the first method's truth.
    assert rows["deletion"].cells[0] == Agreement(pytest.approx(1.0), 30)
    assert (rows["aopc"].arrow, rows["deletion"].arrow) == ("↑", "↓")


def test_those_that_agree_most_come_first_and_the_sentence_says_so() -> None:
    truth = drawn(0)
    table = truth_table(
        measured(gini=-truth, true_effect_rank=truth, entropy=drawn(1), aopc=truth + 0.1 * drawn(2))
    )
    assert table is not None
    assert [row.metric for row in table.rows] == ["aopc", "entropy", "gini"]
    assert table.verdict == (
        "Image by image, aopc agrees most with the true effects (rank correlation "
        f"{table.rows[0].mean:+.2f}, the mean over methods) and gini least (-1.00)."
    )


def test_a_metric_that_one_method_lacks_is_shown_and_not_named() -> None:
    truth = drawn(0)
    lacking = truth.copy()
    lacking[:, 2] = 1.0
    table = truth_table(measured(recall=lacking, gini=-truth, aopc=drawn(2), true_effect_rank=truth))
    assert table is not None
    assert [row.metric for row in table.rows] == ["recall", "aopc", "gini"]
    assert [cell is None for cell in table.rows[0].cells] == [False, False, True, False]
    assert table.verdict.startswith("Image by image, aopc agrees most")


def test_nothing_has_no_minus() -> None:
    assert [signed(one) for one in (-0.004, 0.004, -0.006, 1.0)] == ["+0.00", "+0.00", "-0.01", "+1.00"]


def test_what_cannot_be_compared_is_left_open() -> None:
    truth, constant, rare = drawn(0), np.ones((30, 4)), np.full((30, 4), np.nan)
    rare[:2] = drawn(1, 2)
    table = truth_table(
        measured(aopc=constant, gini=rare, insertion=np.full((30, 4), np.nan), true_effect_rank=truth)
    )
    assert table is not None
    assert all(row.mean is None and row.cells == (None,) * 4 for row in table.rows)
    assert table.verdict == ""
    # Means of two images are ranked all the same: it is the methods that are counted.
    assert [row.over_methods is None for row in table.rows] == [True, False, True]


def test_without_the_truth_or_anything_to_compare_there_is_no_table() -> None:
    assert truth_table(measured(aopc=drawn(0))) is None
    assert truth_table(measured(true_effect_rank=drawn(0), true_effect_top1=drawn(1))) is None
    assert truth_table(Measurements()) is None


def test_what_chance_gives_is_marked() -> None:
    """Of unrelated rankings one in twenty correlates more."""
    generator = np.random.default_rng(0)
    found = [
        Agreement(float(scipy.stats.spearmanr(*generator.normal(size=(2, 40))).statistic), 40) for _ in range(600)
    ]
    assert np.mean([not one.by_chance for one in found]) == pytest.approx(0.05, abs=0.025)
    assert not Agreement(-0.9, 20).by_chance and Agreement(0.9, 4).by_chance


@pytest.fixture(scope="module")
def ran(run_chain: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    document: dict[str, Any] = config_with(
        TINY,
        dataset={"kind": "demo", "images": 6},
        methods=["grad_cam", "gradient"],
        metrics=["true_effect_rank", {"name": "deletion", "steps": 2}, "p_aopc"],
        concepts={"layers": []},
        run={"shard_size": 3},
    )
    return run_chain(document, tmp_path_factory.mktemp("report") / "store")


def page_of(ran: Ran) -> str:
    units = ran.store.runs.read(ran.run_id).units()
    record = ran.store.done(Unit("report"), units[Unit("report")])
    return Path(ran.store.read_file(record, "report")).read_text()


def test_the_page_shows_the_numbers_that_sql_finds(ran: Ran) -> None:
    rows = ran.sql("select method, metric, image_id, value from metrics order by image_id")
    values = {
        (method, metric): [row["value"] for row in rows if (row["method"], row["metric"]) == (method, metric)]
        for method, metric in {(row["method"], row["metric"]) for row in rows}
    }
    page = page_of(ran)
    (section,) = re.findall(r'<section id="truth">.*?</section>', page, flags=re.DOTALL)
    assert '<a href="#truth">' in page
    for metric, sense in (("deletion[steps=2]", -1), ("p_aopc", 1)):
        (line,) = [line for line in section.splitlines() if f"<code>{metric}</code>" in line]
        for method in ("grad_cam", "gradient"):
            merit = sense * np.array(values[method, metric], float)
            expected = scipy.stats.spearmanr(merit, values[method, "true_effect_rank"]).statistic
            assert f">{signed(expected)}</span>" in line
    assert "Image by image, " in html.unescape(section)
    # Two methods have no order to speak of.
    assert section.count('title="not defined"') == 2


def test_every_tag_of_the_section_is_closed(ran: Ran) -> None:
    (section,) = re.findall(r'<section id="truth">.*?</section>', page_of(ran), flags=re.DOTALL)
    opened: list[str] = []
    for closing, name in re.findall(r"<(/?)([a-z][a-z0-9]*)[^>]*>", section):
        if closing:
            assert opened.pop() == name
        else:
            opened.append(name)
    assert opened == []
