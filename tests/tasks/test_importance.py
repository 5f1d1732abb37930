"""Networks that weigh their patches, trained and evaluated as studies: arrays, rows, seeds, the report."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from storage.results import Results
from storage.store import open_store
from storage.verify import verify_store
from tasks import worker
from tasks.config import StudyConfig
from tasks.execute import execute
from tasks.importance.networks import Network, load_network, seed_sets
from tasks.pipeline import STAGES
from tasks.plan import Planner, to_run
from tasks.report.importance_data import measured_networks
from tasks.sources import open_source
from tasks.study import Study
from tests.conftest import Ran, config_with, queries_of
from tests.xai_core.inherent.small import built, saved
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.synthetic import render
from xai_core.training import digest_of, read_trained, save_trained

Chain = Callable[[dict[str, Any], Path], Ran]
COLOURS = ("blue", "green", "red")
# Mask values of the object, class by class.
ON_OBJECT = {"blue": [1], "green": [2], "red": [5]}
SIDE, PATCH = 16, 4
GRID = SIDE // PATCH
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 1.0)
ARGUMENTS = {"num_classes": 3, "img_size": SIDE, "patch_size": PATCH, "importance_width": 4}
EMBEDDING = {**ARGUMENTS, "embed_dim": 6, "component_width": 4}
CREATE: dict[str, dict[str, Any]] = {
    "ia": EMBEDDING,
    "ea": {**EMBEDDING, "context_width": 4},
    "pa": {
        **ARGUMENTS,
        "threshold": 0.4,
        "backbone": "resnet10t",
        "backbone_args": {"channels": [4, 4, 8, 8], "stem_width": 4},
    },
}


def draw(folder: Path, count: int, seed: int) -> Path:
    """Pictures with a square in the colour of their class on grey noise, and masks by class (3: unknown)."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(COLOURS):
        for kind in ("images", "masks"):
            (folder / kind / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.repeat(generator.integers(60, 200, (24, 24, 1)), 3, axis=2).astype(np.uint8)
            inside = np.zeros((24, 24), bool)
            top, left = generator.integers(0, 12, 2)
            inside[top : top + 12, left : left + 12] = True
            pixels[inside] = generator.integers(0, 60, (144, 3))
            pixels[inside, 2 - label] += 180
            mask = np.where(inside, ON_OBJECT[name][0], 0).astype(np.uint8)
            mask[0] = 3
            Image.fromarray(pixels).save(folder / "images" / name / f"{index:02d}.png")
            Image.fromarray(mask).save(folder / "masks" / name / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    draw(folder / "learnt", 24, 0)
    draw(folder / "test", 5, 1)
    return folder


@pytest.fixture(scope="module")
def files(place: Path, run_chain: Chain) -> dict[str, Path]:
    """A trained IA, another seed of it, and the EA and the PA that inherit from the first."""
    found: dict[str, Path] = {}
    for name, kind, seed in (("ia", "ia", 0), ("other", "ia", 1), ("ea", "ea", 0), ("pa", "pa", 0)):
        heir = {} if kind == "ia" else {"checkpoint": str(found["ia"])}
        document = {
            "dataset": {"kind": "folder", "path": str(place / "learnt" / "images")},
            "model": {"name": f"vitrine_{kind}", "pretrained": False, "create_args": CREATE[kind]},
            "methods": [],
            "metrics": [],
            "training": {
                "kind": {"name": kind, **heir},
                "recipe": {"epochs": 12, "batch_size": 8, "learning_rate": 0.01, "shift": 0, "seed": seed},
                "held_out": 0.0,
            },
        }
        ran = run_chain(document, place / "trainings")
        (record,) = [one for _, one in ran.store.records([ran.run_id]) if one.unit.stage == "train"]
        found[name] = place / f"{name}.safetensors"
        shutil.copyfile(ran.store.read_file(record, "trained"), found[name])
    return found


def study(place: Path, networks: Sequence[Path], **changes: Any) -> dict[str, Any]:
    document = {
        "name": "evaluated",
        "dataset": {"kind": "folder", "path": str(place / "test" / "images")},
        "truth": {"masks": str(place / "test" / "masks"), "foreground": ON_OBJECT, "ignore": [3]},
        "methods": [],
        "metrics": [],
        "importance": {"networks": [str(path) for path in networks], "thresholds": list(THRESHOLDS)},
        "run": {"shard_size": 4, "batch_size": 3, "max_bad_fraction": 0.5},
    }
    return config_with(document, **changes)


@pytest.fixture(scope="module")
def ran(place: Path, files: dict[str, Path], run_chain: Chain) -> Ran:
    return run_chain(study(place, list(files.values())), place / "store")


def planned(document: dict[str, Any], store: Path) -> Study:
    open_source.cache_clear()
    return Study(StudyConfig.model_validate(document), open_store(store, create=True))


def name_of(path: Path, kind: str = "ia") -> str:
    return f"{kind}[{digest_of(path)[:12]}]"


# --- the stages -----------------------------------------------------------------------------------------------


def test_a_study_that_only_evaluates_asks_its_model_nothing(ran: Ran) -> None:
    assert ran.counts == {"manifest": 4, "importance": 16, "importance_seeds": 4, "report": 1}
    assert verify_store(ran.store).damage == ()
    assert ran.quarantined == 0
    rows = ran.sql("select count(*) as n, count(distinct image_id) as images from importance_accuracy")
    assert rows == [{"n": 15 * 4 * 11, "images": 15}]


def own_pictures(ran: Ran, place: Path, model: Classifier) -> torch.Tensor:
    """The pictures by image id as a network sees them."""
    rows = ran.sql("select path from images order by image_id")
    return torch.stack([model.preprocess(Image.open(place / "test" / "images" / row["path"])) for row in rows])


@pytest.mark.parametrize(("name", "kind"), [("ia", "ia"), ("ea", "ea"), ("pa", "pa")])
def test_accuracy_by_threshold_one_picture_and_patch_at_a_time(
    ran: Ran, place: Path, files: dict[str, Path], name: str, kind: str
) -> None:
    """The slow twin: from what the network says of each picture alone, in numpy."""
    model = load_network(Network("", str(files[name]), digest_of(files[name]), {"kind": kind}))
    found = {
        (row["image_id"], row["direction"], row["threshold"]): row
        for row in ran.sql(f"select * from importance_accuracy where network = '{name_of(files[name], kind)}'")
    }
    assert len(found) == 15 * (1 + 2 * len(THRESHOLDS))
    labels = [row["label"] for row in ran.sql("select label from images order by image_id")]
    stored = ran.store.xarray(f"importance/{name_of(files[name], kind)}/importance", ran.run_id)
    assert stored.shape == (15, GRID, GRID) and stored.attrs["patch_size"] == PATCH
    seen = set()
    for image_id, image in enumerate(own_pictures(ran, place, model)):
        with torch.no_grad():
            importance, values = (one.numpy() for one in model.module.weigh(image[None]))
            own = int(model(image[None]).argmax()) == labels[image_id]
        np.testing.assert_allclose(stored.sel(image=image_id).values, importance[0], atol=1e-5)
        row = found[image_id, "own", None]
        assert (row["correct"], row["kind"], row["patch_size"]) == (own, kind, PATCH)
        assert row["masked"] == pytest.approx(float((importance < 0.4).mean()) if kind == "pa" else 0.0)
        side = values.shape[-1] // GRID
        for threshold in THRESHOLDS:
            below = importance[0] < np.float32(threshold)
            for direction, hidden in (("insertion", below), ("deletion", ~below)):
                masked = values.copy()
                for at, down in np.argwhere(hidden):
                    masked[0, :, side * at : side * (at + 1), side * down : side * (down + 1)] = 0
                with torch.no_grad():
                    right = int(model.module.decide(torch.from_numpy(masked)).argmax()) == labels[image_id]
                row = found[image_id, direction, threshold]
                assert (row["correct"], row["masked"]) == (right, pytest.approx(hidden.mean()))
                seen.add((right, direction, row["masked"]))
    assert {right for right, _, _ in seen} == {True, False}
    assert len({masked for *_, masked in seen}) > 5


def test_scores_from_their_equations_with_masks_in_the_networks_own_geometry(
    ran: Ran, place: Path, files: dict[str, Path]
) -> None:
    paths = [row["path"] for row in ran.sql("select path from images order by image_id")]
    for name, kind in (("ia", "ia"), ("pa", "pa")):
        id_ = name_of(files[name], kind)
        model = load_network(Network("", str(files[name]), digest_of(files[name]), {"kind": kind}))
        stored = ran.store.xarray(f"importance/{id_}/importance", ran.run_id)
        rows = ran.sql(f"select image_id, metric, value, reason from importance_scores where network = '{id_}'")
        found = {(row["image_id"], row["metric"]): row["value"] for row in rows}
        assert {row["reason"] for row in rows} == {None}
        for image_id, path in enumerate(paths):
            importance = stored.sel(image=image_id).values.astype(np.float64)
            mask = model.preprocess_mask(Image.open(place / "test" / "masks" / path)).numpy()
            patches = mask.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
            known = (patches != 3) & (patches != 255)
            share = ((patches == ON_OBJECT[path.split("/")[0]][0]) & known).sum(-1) / known.sum(-1)
            ious = []
            for a, b in ((importance >= 0.5, share >= 0.5), (importance < 0.5, share < 0.5)):
                ious.append((a & b).sum() / (a | b).sum())
            assert found[image_id, "sparsity"] == pytest.approx(importance.mean(), abs=1e-6)
            assert found[image_id, "segmentation_difference"] == pytest.approx(
                abs(share - importance).mean(), abs=1e-6
            )
            assert found[image_id, "macro_iou"] == pytest.approx(np.mean(ious))


def test_reproducibility_is_each_images_mean_deviation_over_the_seeds(ran: Ran, files: dict[str, Path]) -> None:
    rows = ran.sql("select * from importance_scores where metric = 'reproducibility' order by image_id")
    (name,) = {row["network"] for row in rows}
    assert name.startswith("ia[seeds=2,")
    runs = [
        ran.store.xarray(f"importance/{name_of(files[one])}/importance", ran.run_id).values.reshape(15, -1)
        for one in ("ia", "other")
    ]
    for row, *importance in zip(rows, *runs, strict=True):
        twin = np.mean([statistics.stdev(map(float, pair)) for pair in zip(*importance, strict=True)])
        assert row["value"] == pytest.approx(twin, rel=1e-5)
        assert twin > 0.001
    facts = [one.facts for _, one in ran.store.records() if one.unit.stage == "importance_seeds"]
    assert {(*fact["members"], *fact["seeds"]) for fact in facts} == {
        (name_of(files["ia"]), name_of(files["other"]), 0, 1)
    }


def test_an_ia_finds_the_squares_and_loses_more_with_the_patches_that_matter(
    ran: Ran, files: dict[str, Path]
) -> None:
    (row,) = ran.sql(
        "select avg(correct::int) filter (direction = 'own') as own, "
        "avg(correct::int) filter (direction = 'insertion' and threshold = 1) as nothing "
        f"from importance_accuracy where network = '{name_of(files['ia'])}'"
    )
    assert row["own"] > 0.8
    assert row["nothing"] == pytest.approx(1 / 3)


def test_neither_batches_nor_shards_change_what_is_found(
    ran: Ran, place: Path, files: dict[str, Path], run_chain: Chain
) -> None:
    document = study(place, list(files.values()), run={"shard_size": 15, "batch_size": 32})
    other = run_chain(document, place / "whole")
    assert other.counts["importance"] == 4
    for query in (
        "select * exclude (run_id) from importance_accuracy order by all",
        "select * exclude (run_id) from importance_scores order by network, metric, image_id",
    ):
        one, two = ran.sql(query), other.sql(query)
        assert len(one) == len(two) > 0
        for first, second in zip(one, two, strict=True):
            value = first.pop("value", 0.0), second.pop("value", 0.0)
            assert value[0] == pytest.approx(value[1], abs=1e-5)
            assert first == second


def test_both_tables_are_asked_together(ran: Ran, files: dict[str, Path]) -> None:
    rows = ran.sql(
        "select a.network, i.label_name, avg(a.correct::int) as accuracy, avg(s.value) as sparsity, count(*) as n "
        "from importance_accuracy a join importance_scores s using (run_id, image_id, network) "
        "join images i using (run_id, image_id) where a.direction = 'own' and s.metric = 'sparsity' "
        "group by all order by all"
    )
    assert len(rows) == 4 * 3
    assert {row["n"] for row in rows} == {5}
    assert {row["network"] for row in rows} == {
        name_of(path, name if name in ("ea", "pa") else "ia") for name, path in files.items()
    }


# --- keys and resuming ----------------------------------------------------------------------------------------


def test_the_same_study_again_and_moved_files_do_nothing_and_a_network_more_is_all_that_runs(
    ran: Ran, place: Path, files: dict[str, Path], run_chain: Chain, tmp_path: Path
) -> None:
    store = shutil.copytree(ran.store.root, tmp_path / "store")
    assert run_chain(study(place, list(files.values())), store).counts == {}
    moved = [Path(shutil.copyfile(path, tmp_path / f"moved-{path.name}")) for path in files.values()]
    again = run_chain(study(place, moved), store)
    assert again.counts == {"report": 1}
    fewer = run_chain(study(place, moved[2:]), store)
    assert fewer.counts == {"report": 1}
    assert not [one for one in fewer.store.records([fewer.run_id]) if one[1].unit.stage == "importance_seeds"]
    document = study(place, moved, importance={"thresholds": [0.5]})
    assert run_chain(document, store).counts == {"importance": 16, "importance_seeds": 4, "report": 1}


def test_keys_hold_what_results_depend_on_and_no_path(ran: Ran, place: Path, files: dict[str, Path]) -> None:
    name = name_of(files["ia"])
    masks = shutil.copytree(place / "test" / "masks", place / "other masks")
    (masks / "red" / "00.png").touch()

    def reads(**changes: Any) -> dict[str, Any]:
        one = planned(study(place, list(files.values()), **changes), place / "store")
        return dict(STAGES["importance"].reads(one, name))

    plain = reads()
    assert plain["network"] == digest_of(files["ia"])
    assert str(place) not in str(plain)
    assert reads(importance={"thresholds": [1.0, 0.0, 0.3, 0.7, 0.5]}) == plain
    assert reads(run={"batch_size": 1}) == plain
    for changes in (
        {"importance": {"thresholds": [0.5]}},
        {"truth": {"foreground": [2]}},
        {"truth": {"masks": str(masks)}},
        {"run": {"precision": "bf16"}},
    ):
        assert reads(**changes) != plain


def works_of(one: Study, stage: str) -> list[Any]:
    planner = Planner(one)
    for name in STAGES:
        works = to_run(planner.stage(STAGES[name]))
        if name == stage:
            return works
        if name == "manifest":
            for work in works:
                execute(work)
    raise AssertionError(stage)


def test_a_file_that_changes_while_a_study_runs_is_refused(
    place: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copyfile(files["ia"], tmp_path / "ia.safetensors"))
    work, *_ = works_of(planned(study(place, [path]), tmp_path / "store"), "importance")
    shutil.copyfile(files["other"], path)
    with pytest.raises(UsageError, match=r"importance\.networks: expected the file with digest .* run it again"):
        execute(work)


def test_an_image_that_one_network_set_aside_has_no_reproducibility(
    place: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Broken between two networks of one shard; the mask of another is gone for both."""
    test = shutil.copytree(place / "test", tmp_path / "test")
    document = study(place, [files["ia"], files["other"]], run={"shard_size": 15})
    document["dataset"]["path"], document["truth"]["masks"] = str(test / "images"), str(test / "masks")
    one = planned(document, tmp_path / "store")
    first, second = works_of(one, "importance")
    (test / "masks" / "red" / "01.png").unlink()
    told = [execute(first)]
    (test / "images" / "blue" / "02.png").write_bytes(b"no picture")
    worker._kept.clear()
    told.append(execute(second))
    assert [(receipt.ok, receipt.quarantined) for receipt in told] == [(14, 1), (13, 2)]
    planner = Planner(one)
    planner.stage(STAGES["manifest"])
    planner.stage(STAGES["importance"])
    (work,) = to_run(planner.stage(STAGES["importance_seeds"]))
    receipt = execute(work)
    assert (receipt.images, receipt.ok, receipt.quarantined) == (13, 13, 0)
    record = one.store.done(work.unit, work.key)
    assert record is not None
    ids = set(one.store.read_table(record, "importance_scores")["image_id"].to_pylist())
    listed = {row["reference"]: image_id for image_id, row in enumerate(one.listing.slice(0, 15))}
    assert set(listed.values()) - ids == {listed["red/01.png"], listed["blue/02.png"]}


def test_a_network_that_says_nothing_finite_sets_its_images_aside(
    place: Path, files: dict[str, Path], run_chain: Chain, tmp_path: Path
) -> None:
    tensors, about = read_trained(files["other"])
    save_trained(tmp_path / "nan.safetensors", {**tensors, "head.2.bias": torch.full((3,), torch.nan)}, about)
    document = study(place, [files["ia"], tmp_path / "nan.safetensors"], run={"max_bad_fraction": 1.0})
    ran = run_chain(document, tmp_path / "store")
    assert ran.quarantined == 15
    (told,) = ran.sql("select distinct stage, method, error from quarantine")
    assert told == {
        "stage": "importance",
        "method": name_of(tmp_path / "nan.safetensors"),
        "error": "NotFinite",
    }
    assert ran.sql("select count(*) as n from importance_scores where metric = 'reproducibility'") == [{"n": 0}]
    valid = ran.store.xarray(f"importance/{name_of(tmp_path / 'nan.safetensors')}/valid", ran.run_id)
    assert not valid.values.any()
    page = report_of(ran)
    assert f"ia[{digest_of(files['ia'])[:12]}]" in page
    assert "No picture could be evaluated by IA(4, 6), seed 1 ia[" in page
    assert page.count(">set aside</div>") == 6


def test_drawn_scenes_bring_their_masks(run_chain: Chain, tmp_path: Path) -> None:
    model = built("ia", num_classes=12)
    path = saved(model, tmp_path / "ia.safetensors")
    document = {
        "dataset": {"kind": "demo", "images": 4},
        "methods": [],
        "metrics": [],
        "importance": {"networks": [str(path)], "thresholds": [0.5]},
    }
    ran = run_chain(document, tmp_path / "store")
    rows = ran.sql("select image_id, value from importance_scores where metric = 'segmentation_difference'")
    stored = ran.store.xarray(f"importance/{name_of(path)}/importance", ran.run_id)
    paths = {row["image_id"]: row["path"] for row in ran.sql("select image_id, path from images")}
    assert len(rows) == 4
    for row in rows:
        _, seed, index = paths[row["image_id"]].split("/")
        drawn = model.preprocess_mask(Image.fromarray(render(int(seed), int(index)).object_mask)).numpy()
        share = drawn.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
        importance = stored.sel(image=row["image_id"]).values
        assert row["value"] == pytest.approx(abs(share - importance).mean(), abs=1e-6)


# --- sets of seeds --------------------------------------------------------------------------------------------


def network(digest: str, seed: int | None, kind: str = "ia", config: Any = None, **recipe: Any) -> Network:
    about = {"kind": kind, "config": config or {}, "model": {}}
    if seed is not None:
        about["recipe"] = {"epochs": 1, "seed": seed, **recipe}
    return Network(f"{kind}[{digest}]", "", digest, about)


def test_a_set_differs_in_nothing_but_the_seed() -> None:
    a, b, c = network("a", 0), network("b", 2), network("c", 1)
    (one,) = seed_sets([a, b, c])
    assert one.members == (a, c, b)
    assert one == seed_sets([c, b, a])[0]
    assert one.id.startswith("ia[seeds=3,") and one.id != seed_sets([a, b])[0].id[:11]
    for other in (
        network("d", 1, epochs=2),
        network("d", 1, config={"create_args": {"embed_dim": 8}}),
        network("d", None),
        network("d", 1, kind="ea"),
        network("d", 0),
    ):
        assert seed_sets([a, other]) == ()
    assert seed_sets([network("a", 0, kind="ea"), network("b", 1, kind="ea")]) == ()
    assert seed_sets([a, c, network("d", 0)]) == ()
    assert len(seed_sets([a, c, network("d", 0, epochs=2), network("e", 1, epochs=2)])) == 2


# --- the report -----------------------------------------------------------------------------------------------


def report_of(ran: Ran) -> str:
    (report,) = [one for _, one in ran.store.records([ran.run_id]) if one.unit.stage == "report"]
    return ran.store.read_file(report, "report").read_text()


def test_the_report_tells_of_every_network(ran: Ran, files: dict[str, Path]) -> None:
    page = report_of(ran)
    section = page.split('<section id="importance">')[1].split("</section>")[0]
    assert '<a href="#importance">' in page
    for title, name in (
        ("IA(4, 6), seed 0", name_of(files["ia"])),
        ("IA(4, 6), seed 1", name_of(files["other"])),
        ("EA(4, 6), seed 0", name_of(files["ea"], "ea")),
        ("PA(4, 0.4), seed 0", name_of(files["pa"], "pa")),
    ):
        assert f"{title}<br><code>{name}</code>" in section
    assert section.count("r over seeds 0, 1") == 2
    means = ran.sql("select network, metric, avg(value) as mean from importance_scores group by all order by all")
    for row in means:
        assert f">{row['mean']:.3f}<br>" in section
    (own,) = ran.sql(
        "select avg(correct::int) as accuracy, avg(masked) as masked from importance_accuracy "
        f"where direction = 'own' and network = '{name_of(files['pa'], 'pa')}'"
    )
    assert f">{own['accuracy']:.3f}<br>" in section and f">{own['masked']:.3f}<br>" in section
    assert section.count("<img src=") == 6 * 5
    assert re.search(r"· (right|wrong)</figcaption>", section)
    assert len(queries_of(page)) == 2 and all(ran.sql(one) for one in queries_of(page))


def test_the_reports_curves_are_the_rows(ran: Ran, files: dict[str, Path]) -> None:
    page = report_of(ran)
    section = page.split('<section id="importance">')[1].split("</section>")[0]
    (figure,) = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    name = name_of(files["ea"], "ea")
    lines = {trace["name"]: trace for trace in figure["data"] if "name" in trace}
    assert len(lines) == 4 * 2
    for direction, told in (("insertion", "least"), ("deletion", "most")):
        rows = ran.sql(
            "select threshold, avg(correct::int) as accuracy, avg(masked) as masked from importance_accuracy "
            f"where network = '{name}' and direction = '{direction}' group by all order by masked, threshold"
        )
        line = lines[f"EA(4, 6), seed 0 {name}, {told} important hidden"]
        assert line["x"] == pytest.approx([row["masked"] for row in rows], rel=1e-3, abs=1e-4)
        assert line["y"] == pytest.approx([row["accuracy"] for row in rows], rel=1e-3)
        for row in rows:
            assert f"{100 * row['accuracy']:.1f}<br><small>{100 * row['masked']:.0f} %</small>" in section


def test_a_study_that_evaluates_nothing_has_no_section(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    assert measured_networks(Results(store, ())) == []
    assert "importance" not in StudyConfig().identity()
    assert StudyConfig().asks_model


def test_a_study_that_explains_too_asks_its_model(place: Path, files: dict[str, Path]) -> None:
    document = study(place, [files["ia"]])
    assert not StudyConfig.model_validate(document).asks_model
    assert "importance" in StudyConfig.model_validate(document).identity()
    for changes in ({"methods": ["grad_cam"]}, {"concepts": {"layers": ["layer4"]}}):
        assert StudyConfig.model_validate(config_with(document, **changes)).asks_model
