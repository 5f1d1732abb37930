"""The report and the leaderboard: the page says what the store says, escapes what it shows and loads nothing."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from storage import open_store
from storage.commits import Unit
from storage.errors import StoreError
from storage.results import Results
from storage.runs import RunRecord
from storage.schema import rows_to_table
from storage.sql import query
from tasks.bootstrap import bootstrap_means
from tasks.config import StudyConfig
from tasks.execute import execute
from tasks.leaderboard import Standing, best, leaderboard, leaderboard_markdown
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.report.curves import GRID, mean_curves
from tasks.report.data import Committed
from tasks.report.gallery import Chosen, choose
from tasks.report.leaderboard import verdict
from tasks.report.stage import render
from tasks.stage import Context
from tasks.study import Study

HOSTILE = "<b>x"
METHODS = ["grad_cam", "integrated_gradients[steps=2]", "kl_hessian"]
METRICS = ["deletion[steps=4]", "p_insertion"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two class folders, one with a hostile name; a black picture (its map is constant) and a broken one."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) * (index > 0)
        place = folder / (HOSTILE if index % 2 else "plain")
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    (folder / HOSTILE / "broken.png").write_bytes(b"no picture at all")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(tmp_path_factory.mktemp("store"), create=True)


def study_of(pictures, store, **changes):
    document = {
        "name": "report",
        "dataset": {"kind": "folder", "path": str(pictures)},
        "model": {
            "name": "resnet10t",
            "pretrained": False,
            "create_args": {"num_classes": 2},
            "transform": {"input_size": [3, 64, 64]},
        },
        "parts": {"parser": "grid", "k": 4},
        "methods": ["grad_cam", {"name": "integrated_gradients", "steps": 2}, "kl_hessian"],
        "metrics": [{"name": "deletion", "steps": 4}, "p_insertion"],
        "concepts": {"layers": ["layer3"], "per_image": 2, "extractors": ["bisecting_kmeans"]},
        "run": {"shard_size": 4, "max_bad_fraction": 0.5},
    }
    return Study(StudyConfig.model_validate({**document, **changes}), store)


def run_study(study):
    """The whole chain in this process; gives back the report's context."""
    run = RunRecord(
        study.run_id,
        study.config.name,
        study.config.identity(),
        {"vitrine": "0"},
        created="2020-01-01T00:00:00+00:00",
    )
    planner = Planner(study)
    for stage in STAGES.values():
        planned = planner.stage(stage)
        run = run.with_keys({one.unit: one.key for one in planned})
        study.store.runs.write(run)
        for work in to_run(planned):
            execute(work)
    return Context(planned[0].work, study.store, None, "cpu")


@pytest.fixture(scope="module")
def context(pictures, store):
    return run_study(study_of(pictures, store))


@pytest.fixture(scope="module")
def page(context):
    record = context.store.done(context.work.unit, context.work.key)
    return context.store.read_file(record, "report").read_text()


def body_of(page):
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


def test_every_method_and_metric_is_there(page):
    text = html.unescape(body_of(page))
    for name in (*METHODS, *METRICS):
        assert name in text


def test_numbers_are_those_of_sql(page, context):
    rows = query(
        context.store,
        "select method, metric, avg(value) as mean, count(value) as n, count(*) - count(value) as nulls "
        "from metrics group by all",
        run_ids=[context.work.facts["run_id"]],
    ).to_pylist()
    assert len(rows) == len(METHODS) * len(METRICS)
    found = {(row.method, row.metric): row for row in leaderboard(context.store, context.work.facts["run_id"])}
    text = html.unescape(body_of(page))
    for row in rows:
        standing = found[row["method"], row["metric"]]
        assert standing.mean == pytest.approx(row["mean"], abs=1e-12)
        assert (standing.count, standing.nulls) == (row["n"], row["nulls"])
        assert f"{row['mean']:.3f}" in text


def test_leaderboard_keeps_the_config_order(context):
    rows = leaderboard(context.store, context.work.facts["run_id"])
    assert [(row.method, row.metric) for row in rows] == [(a, b) for a in METHODS for b in METRICS]
    assert {row.metric: row.higher_is_better for row in rows} == {METRICS[0]: False, METRICS[1]: True}


def test_an_undefined_value_is_counted_and_left_out(page, context):
    found = {(row.method, row.metric): row for row in leaderboard(context.store, context.work.facts["run_id"])}
    black = found["integrated_gradients[steps=2]", "deletion[steps=4]"]
    assert (black.count, black.nulls) == (5, 1)
    assert "1 null" in body_of(page)
    assert "constant map" in body_of(page)


def test_why_values_are_missing_stands_beside_the_count_and_below(page):
    body = body_of(page)
    assert 'title="the map is constant: 1">1 null' in body
    below = body[body.index("Missing values: why, and of how many images") :]
    row = re.search(r"<tr>.*?</tr>", below[below.index("<tbody>") :], flags=re.DOTALL)
    assert "deletion[steps=4]" in row[0]
    assert "the map is constant" in row[0]
    assert "integrated_gradients[steps=2]: 1" in row[0]


def test_pairs_are_those_of_sql_and_folded(page, context):
    body = body_of(page)
    pairs = body[body.index("Paired differences: each method against the best") :]
    pairs = pairs[: pairs.index("</details>")]
    run_id = context.work.facts["run_id"]
    leads = best(leaderboard(context.store, run_id))
    pairs_of = query(context.store, "from paired_differences", run_ids=[run_id]).to_pylist()
    rows = [row for row in pairs_of if (row["method_b"], row["metric"]) in leads]
    assert len(rows) == pairs.count("<tr") - len(METRICS) == (len(METHODS) - 1) * len(METRICS)
    for row in rows:
        assert f"{row['mean_difference']:+.3f}" in pairs
        assert f'<td class="right">{row["images"]}</td>' in pairs
    assert not re.search(r"<details[^>]*\bopen\b", body)
    assert "not corrected for their number: of the 3 pairs on a metric" in body
    assert "Method against method" in body


def test_nothing_is_loaded_from_anywhere(page):
    body = body_of(page)
    loads = re.findall(r"""\b(?:src|href|srcset|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", body)
    assert loads and all(one.startswith(("data:", "#")) for one in loads)
    assert not re.search(r"<script[^>]+src|<link[^>]+stylesheet|<iframe|<object|<embed", page)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert "@import" not in styles and "url(" not in styles
    assert "default-src 'none'" in page


def test_what_the_user_named_is_escaped(page):
    assert HOSTILE not in page
    assert html.escape(HOSTILE) in page


def test_a_hostile_study_name_stays_text(pictures, store, context):
    config = context.config.model_copy(update={"name": "</title><script>alert(1)</script>"})
    work = replace(context.work, config=config)
    shown = render(Context(work, store, None, "cpu"))
    assert "<script>alert" not in shown
    assert "&lt;/title&gt;&lt;script&gt;alert(1)" in shown


def test_the_quarantined_file_is_listed(page):
    body = html.unescape(body_of(page))
    assert f"{HOSTILE}/broken.png" in body
    assert "1 of 7 images could not be treated" in body
    assert "Nothing was quarantined" not in body


def test_every_picture_has_a_text_and_is_inside_the_page(page):
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) == 6 * (2 + len(METHODS))
    assert all('src="data:image/jpeg;base64,' in one and re.search(r'alt="[^"]+"', one) for one in images)


def test_the_page_is_small_and_the_same_twice(page, context):
    assert len(page) < 8e6
    assert render(context) == page


def test_charting_library_is_there_once(page):
    assert page.count("plotly.js v") >= 1
    assert len(re.findall(r"<script", page)) == 3


def test_a_run_without_metrics_concepts_and_most_images(pictures, store):
    study = study_of(
        pictures,
        store,
        dataset={"kind": "folder", "path": str(pictures), "limit": 1, "order_seed": 3},
        metrics=[],
        concepts={},
        methods=[{"name": "integrated_gradients", "steps": 2}],
    )
    shown = html.unescape(body_of(render(run_study(study))))
    assert shown.count("<article") == 1
    assert "No metric has been measured" in shown
    assert "No layer was asked for" in shown
    assert 'class="plot"' not in shown
    assert leaderboard(store, study.run_id) == []


def test_labels_that_are_not_the_models_classes(pictures, store):
    model = {
        "name": "resnet10t",
        "pretrained": False,
        "create_args": {"num_classes": 3},
        "transform": {"input_size": [3, 64, 64]},
    }
    study = study_of(pictures, store, model=model, methods=["grad_cam"], metrics=["p_insertion"], concepts={})
    shown = html.unescape(body_of(render(run_study(study))))
    assert "labels are not the model's classes" in shown
    assert "not judged" in shown


def test_missing_masks_leave_gaps_and_rows(pictures, store, tmp_path):
    mask = np.repeat(np.repeat(np.arange(4, dtype=np.uint8).reshape(2, 2), 32, axis=0), 32, axis=1)
    (tmp_path / "plain").mkdir()
    Image.fromarray(mask).save(tmp_path / "plain" / "2.png")
    study = study_of(
        pictures,
        store,
        dataset={"kind": "folder", "path": str(pictures), "masks": str(tmp_path)},
        parts={"parser": "masks"},
        methods=["grad_cam", "kl_hessian"],
        concepts={},
        run={"shard_size": 8, "max_bad_fraction": 1},
    )
    shown = html.unescape(body_of(render(run_study(study))))
    assert shown.count(">no parts<") == 5
    assert shown.count(">no map<") == 5
    assert all(row.count <= 1 and row.low is None for row in leaderboard(store, study.run_id))


def test_pictures_that_changed_since_are_left_out(pictures, context):
    path = pictures / "plain" / "2.png"
    content = path.read_bytes()
    try:
        path.write_bytes(b"gone bad")
        shown = body_of(render(context))
    finally:
        path.write_bytes(content)
    assert "1 chosen picture could no longer be read" in shown


def test_mean_curves_agree_with_sql_and_with_their_metric(context):
    curves = mean_curves(Committed(context).results)
    assert [one.curve for one in curves] == ["deletion[steps=4]"] * 3 + ["part_insertion"] * 3
    steps = query(
        context.store,
        "select avg(prob) as p from curves where method = 'grad_cam' and curve = 'deletion[steps=4]' "
        "group by step order by step",
        run_ids=[context.work.facts["run_id"]],
    )
    found = next(one for one in curves if one.method == "grad_cam")
    assert np.allclose(found.mean[::25], steps["p"].to_numpy(), atol=1e-6)
    area = np.trapezoid(found.mean, GRID)
    means = {
        (row.method, row.metric): row.mean for row in leaderboard(context.store, context.work.facts["run_id"])
    }
    assert area == pytest.approx(means["grad_cam", "deletion[steps=4]"], abs=1e-4)


def test_mean_curve_over_images_with_different_numbers_of_parts(tmp_path):
    """Two straight lines from 0 to 1, one in two steps and one in four: so is their mean."""
    store = open_store(tmp_path / "store", create=True)
    commit = store.begin(Unit("metrics", "m"), "k" * 64, {})
    lengths = {0: 3, 1: 5}
    fraction = [step / (length - 1) for length in lengths.values() for step in range(length)]
    columns = {
        "image_id": [image for image, length in lengths.items() for _ in range(length)],
        "method": ["m"] * 8,
        "curve": ["part_insertion"] * 8,
        "step": [step for length in lengths.values() for step in range(length)],
        "fraction": fraction,
        "prob": fraction,
    }
    commit.table("curves", rows_to_table("curves", columns))
    (curve,) = mean_curves(Results(store, (("r", commit.finish({})),)))
    assert curve.count == 2
    assert np.allclose(curve.mean, GRID, atol=1e-6)
    assert np.allclose(curve.margin, 0, atol=1e-6)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=60)
    mean, low, high = bootstrap_means(values[:, None], resamples=9999)
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert mean[0] == pytest.approx(values.mean())
    width = wanted.high - wanted.low
    assert low[0] == pytest.approx(wanted.low, abs=0.03 * width)
    assert high[0] == pytest.approx(wanted.high, abs=0.03 * width)


def test_bootstrap_of_many_images_is_the_normal_interval():
    values = np.random.default_rng(0).normal(size=(20_000, 2))
    mean, low, high = bootstrap_means(values)
    assert np.allclose(high - low, 2 * 1.96 / np.sqrt(20_000), rtol=0.06)
    assert ((low < mean) & (mean < high)).all()


def test_bootstrap_leaves_undefined_values_out():
    nan = np.nan
    values = np.array([[1.0, nan, nan], [nan, nan, 5.0], [3.0, nan, nan]])
    mean, low, high = bootstrap_means(values)
    assert mean[0] == 2 and np.isnan(mean[1]) and mean[2] == 5
    assert (low[0], high[0]) == (1, 3)
    assert np.isnan(low[1:]).all() and np.isnan(high[1:]).all()


def standing(method, metric, mean, *, up=True):
    return Standing(method, metric, mean, None, None, 3, 0, up)


def test_best_follows_the_direction_and_knows_ties():
    rows = [
        standing("a", "up", 2.0),
        standing("b", "up", 1.0),
        standing("a", "down", 2.0, up=False),
        standing("b", "down", 1.0, up=False),
        standing("a", "tie", 1.0),
        standing("b", "tie", 1.0),
        standing("a", "lone", 1.0),
        standing("b", "lone", None),
    ]
    assert best(rows) == {("a", "up"), ("b", "down"), ("a", "tie"), ("b", "tie")}
    assert verdict(rows) == "a and b each have the best mean on 2 of 3 metrics."
    assert verdict(rows[:2]) == "a has the best mean on 1 of 1 metric."
    assert verdict(rows[:1]) == ""
    tied = [standing(method, "up", 1.0) for method in "abc"]
    assert verdict(tied) == "a, b and c each have the best mean on 1 of 1 metric."


def test_markdown_names_best_gaps_and_directions():
    rows = [
        Standing("a|b", "deletion", 0.25, 0.2, 0.3, 5, 1, False),
        Standing("c", "deletion", 0.5, 0.4, 0.6, 6, 0, False),
        Standing("d", "deletion", None, None, None, 0, 6, False),
    ]
    text = leaderboard_markdown(rows)
    assert "| method | deletion ↓ |" in text
    assert r"| a\|b | **0.250** [0.200, 0.300] n=5, 1 undefined |" in text
    assert "| c | 0.500 [0.400, 0.600] n=6 |" in text
    assert "| d | undefined (6) |" in text
    assert leaderboard_markdown([]) == "No metric has been measured.\n"


def test_an_unknown_run_is_an_error(store):
    with pytest.raises(StoreError, match="nobody"):
        leaderboard(store, "nobody")


def chosen(image_id, label, correct, probability=0.5):
    return Chosen(image_id, "", "", label, label, probability, label, correct)


def test_gallery_mixes_sure_mistakes_and_classes():
    images = [chosen(i, f"class {i % 4}", i % 5 != 0, i / 100) for i in range(40)]
    ids = [one.image_id for one in choose(images, 12)]
    assert ids[:4] == [35, 30, 25, 20]
    assert ids[4:8] == [1, 2, 3, 4]
    assert len(set(ids)) == 12
    assert choose(images, 12) == choose(list(images), 12)
    assert choose([], 12) == []
    assert [one.image_id for one in choose([chosen(7, None, None)], 12)] == [7]
