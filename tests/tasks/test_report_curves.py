"""Mean curves of every kind, and their charts: headings, axes and scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from storage import open_store
from storage.commits import Unit
from storage.results import Results
from storage.schema import rows_to_table
from tasks.curve_kinds import GROUPS, INFORMATION, KINDS, RANDOMISED, REPLACED, UNKNOWN, kind_of, place_of
from tasks.report.curves import GRID, MeanCurve, mean_curves
from tasks.report.figures import Chart, curve_charts, in_groups, legend
from tests.conftest import TINY, config_with

# Points (fraction, value) of one image.
Points = list[tuple[float, float]]


def curves_of(folder: Path, curves: dict[str, list[Points]], method: str = "m") -> list[MeanCurve]:
    """The mean curves of a store that holds these, image by image."""
    store = open_store(folder / "store", create=True)
    commit = store.begin(Unit("metrics", method), "k" * 64, {})
    rows = [
        (image, method, name, step, x, y)
        for name, images in curves.items()
        for image, points in enumerate(images)
        for step, (x, y) in enumerate(points)
    ]
    names = ("image_id", "method", "curve", "step", "fraction", "prob")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    commit.table("curves", rows_to_table("curves", columns))
    return mean_curves(Results(store, (("run", commit.finish({})),)))


def test_curves_whose_images_have_other_steps_are_joined_point_by_point(tmp_path: Path) -> None:
    images: list[Points] = [[(0, 0), (0.1, 0.5), (1, 0.5)], [(0, 1), (0.6, 0), (1, 1)]]
    (found,) = curves_of(tmp_path, {"aic": images})
    twin = np.mean([np.interp(GRID, *zip(*points, strict=True)) for points in images], axis=0)
    assert np.allclose(found.mean, twin, atol=1e-6)


def test_a_curve_says_nothing_before_its_first_step_and_after_its_last(tmp_path: Path) -> None:
    (found,) = curves_of(tmp_path, {"road_most": [[(0.1, 1), (0.9, 0)], [(0.2, 1), (0.7999, 0.5)]]})
    assert GRID[found.covered][[0, -1]] == pytest.approx([0.2, 0.8])
    assert np.isnan(found.mean[~found.covered]).all()
    assert found.mean[found.covered][-1] == pytest.approx((0.125 + 0.5) / 2, abs=1e-6)
    (chart,) = curve_charts([found], legend(["m"]))
    band, line = json.loads(chart.json)["data"]
    assert (line["x"][0], line["x"][-1], len(line["x"])) == (0.2, 0.8, 61)
    assert len(band["x"]) == 122
    assert None not in line["y"]


def mean_curve(curve: str, values: list[float], method: str = "m") -> MeanCurve:
    """One image's curve, straight between equally spaced values."""
    found = MeanCurve(method, curve)
    found.add(np.interp(GRID, np.linspace(0, 1, len(values)), values)[None])
    return found


def charts_of(*curves: MeanCurve) -> dict[str, Chart]:
    methods = list(dict.fromkeys(one.method for one in curves))
    ordered = sorted(curves, key=lambda one: (place_of(one.curve), one.curve))
    names = dict.fromkeys(one.curve for one in ordered)
    return dict(zip(names, curve_charts(ordered, legend(methods)), strict=True))


def layout(chart: Chart) -> dict[str, dict[str, object]]:
    return json.loads(chart.json)["layout"]  # type: ignore[no-any-return]


def test_every_kind_has_its_heading_and_its_axes() -> None:
    names = ["novel[a=1]", "randomisation[measure=ssim]", "sic", "aic", "road_least", "part_deletion", "insertion"]
    charts = charts_of(*(mean_curve(name, [0.0, 0.5]) for name in names))
    assert [group for group, _ in in_groups(list(charts.values()))] == list(GROUPS)
    axes = {name: (layout(one)["xaxis"]["title"], layout(one)["yaxis"]["title"]) for name, one in charts.items()}
    texts = {name: (x["text"], y["text"]) for name, (x, y) in axes.items()}  # type: ignore[index]
    assert texts["insertion"] == ("share of pixels", "p(target)")
    assert texts["part_deletion"] == ("share of parts", "p(target)")
    assert texts["aic"] == ("share of information", "accuracy")
    assert texts["randomisation[measure=ssim]"] == ("share of layers", "similarity")
    assert texts["novel[a=1]"] == ("fraction", "value")
    assert charts["novel[a=1]"].kind.title == "novel"
    assert charts["randomisation[measure=ssim]"].variant == "measure=ssim"


def test_charts_that_are_compared_share_a_scale_and_others_have_their_own() -> None:
    charts = charts_of(
        mean_curve("insertion", [0.0, 0.8]),
        mean_curve("deletion", [0.5, 0.1]),
        mean_curve("aic", [0.0, 1.0]),
        mean_curve("randomisation", [1.0, -0.5]),
        mean_curve("novel", [3.0, 7.0]),
    )
    span = {name: layout(chart)["yaxis"]["range"] for name, chart in charts.items()}
    assert span["insertion"] == span["deletion"] == [0, pytest.approx(0.8 * 1.04)]
    assert span["aic"] == [0, 1.04]
    assert span["randomisation"] == [pytest.approx(-0.56), pytest.approx(1.06)]
    assert span["novel"] == [0, pytest.approx(7.28)]
    assert "from 1.00 over 0.25 half-way to -0.50" in charts["randomisation"].description


def test_what_the_metrics_record_is_of_a_known_kind(run_chain, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    study = config_with(
        TINY,
        dataset={"images": 2},
        methods=["grad_cam"],
        concepts={"layers": []},
        metrics=[
            *({"name": name, "steps": 2} for name in ("insertion", "deletion", "srg")),
            *("p_insertion", "p_deletion", "irof"),
            *({"name": name, "thresholds": [0.1]} for name in ("aic", "sic")),
            {"name": "road", "percentages": [50]},
            {"name": "randomisation", "fractions": [1.0]},
        ],
    )
    names = [row["curve"] for row in run_chain(study, tmp_path / "store").sql("select distinct curve from curves")]
    assert {name.split("[")[0] for name in names} == set(KINDS)


def test_kinds_are_known_by_the_stem_of_their_id() -> None:
    assert kind_of("deletion[baseline=black,steps=20]") is KINDS["deletion"]
    assert kind_of("deletions").group is UNKNOWN
    assert {kind.group for kind in KINDS.values()} == set(GROUPS) - {UNKNOWN}
    assert (kind_of("sic").group, kind_of("randomisation").group, kind_of("insertion").group) == (
        INFORMATION,
        RANDOMISED,
        REPLACED,
    )
