"""Configs: every default, and refusals that name the key, what was expected and what was got."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.config import load_config
from tasks.config import StudyConfig, options_of
from xai_core.errors import UsageError
from xai_core.registry import methods

CURVE = {"baseline": "blur", "sigma": 11.0, "seed": 0}
PIXEL_CURVE = {**CURVE, "steps": 50}


def choice(name: str, **options: object) -> dict[str, object]:
    return {"name": name, "options": options, "id": name}


DEFAULTS = {
    "name": "demo",
    "dataset": {
        "kind": "demo",
        "path": None,
        "classes": None,
        "masks": None,
        "order_seed": 0,
        "limit": None,
        "images": 64,
        "seed": 1,
    },
    "model": {
        "name": "vitrine_demo_vit",
        "pretrained": True,
        "checkpoint": None,
        "create_args": {},
        "transform": {},
    },
    "target": "top1",
    "truth": {"masks": None, "foreground": None, "ignore": [], "boxes": None},
    "parts": {"parser": choice("tokens", restarts=4), "k": 12, "backbone": None, "min_area": 0.005},
    "methods": [
        choice("grad_cam", layer=None),
        choice("integrated_gradients", steps=50, baseline="black"),
        choice(
            "kl_hessian",
            epsilon=0.2,
            delta=0.06,
            blend=0.4,
            gamma=1.0,
            hessian="finite_difference",
            score="full",
        ),
    ],
    "metrics": [
        choice("insertion", **PIXEL_CURVE),
        choice("deletion", **PIXEL_CURVE),
        choice("aopc", **PIXEL_CURVE),
        choice("p_insertion", **CURVE),
        choice("p_deletion", **CURVE),
        choice("p_aopc", **CURVE),
    ],
    "concepts": {
        "layers": [],
        "per_image": 1,
        "class_token": True,
        "receptive_fields": {"size": 14, "attributor": "auto"},
        "atoms": None,
        "exemplars": {"count": 10, "distinct_images": True},
        "graph": None,
        "cafe": None,
    },
    "training": None,
    "importance": None,
    "run": {
        "shard_size": 128,
        "batch_size": 32,
        "seed": 0,
        "device": "auto",
        "precision": "fp32",
        "max_bad_fraction": 0.01,
    },
    "compute": {"workers": None, "scheduler": None, "memory_limit": None},
}


def test_every_default_is_what_the_documents_say() -> None:
    found = StudyConfig().model_dump(mode="json")
    extractors = [one["id"] for one in found["concepts"].pop("extractors")]
    assert extractors == ["bisecting_kmeans", "sae"]
    assert found == DEFAULTS


def test_a_dumped_config_reads_back_as_itself() -> None:
    config = load_config(
        None, ["methods=[{name: kl_hessian, epsilon: 0.3}]", "parts.backbone=vitrine_demo_resnet"]
    )
    assert StudyConfig.model_validate(config.model_dump(mode="json")) == config
    assert StudyConfig.model_validate_json(config.model_dump_json()) == config


def test_options_off_their_default_are_part_of_the_id() -> None:
    config = load_config(None, ["methods=[{name: kl_hessian, epsilon: 0.3}, {name: kl_hessian, gamma: 1.0}]"])
    assert [one.id for one in config.methods] == ["kl_hessian[epsilon=0.3]", "kl_hessian"]
    assert options_of(methods, config.methods[0]).epsilon == 0.3


REFUSED = [
    (["run.shard_siz=2"], r"run\.shard_siz: unknown key; did you mean 'shard_size'"),
    (["rnu.seed=2"], r"rnu: unknown key; did you mean 'run'"),
    (["parts.backbone.nam=x"], r"parts\.backbone\.nam: unknown key; did you mean 'name'"),
    (["methods=[grad_cm]"], r"methods\.0: unknown method 'grad_cm': did you mean 'grad_cam'"),
    (["metrics=[insertoin]"], r"metrics\.0: unknown metric 'insertoin': did you mean 'insertion'"),
    (["parts.parser=tokns"], r"parts\.parser: unknown parser 'tokns': did you mean 'tokens'"),
    (["concepts.extractors=[sea]"], r"concepts\.extractors\.0: unknown extractor 'sea': did you mean 'sae'"),
    (["methods=[{name: kl_hessian, epsilon: big}]"], r"methods\.0: option epsilon: .+ got 'big'"),
    (["methods=[{name: kl_hessian, hessian: exactly}]"], r"option hessian: .+'exact', got 'exactly'"),
    (["methods=[{name: kl_hessian, epsilo: 1}]"], r"methods\.0: no option 'epsilo'; it takes epsilon, delta"),
    (["methods=[{epsilon: 1}]"], r"methods\.0: expected a method's name, .+ got \{'epsilon': 1\}"),
    (["methods=[3]"], r"methods\.0: expected a method's name, .+ got 3"),
    (["methods=[{name: [a]}]"], r"methods\.0: expected a method's name"),
    (["methods=grad_cam"], r"methods: expected a list, got 'grad_cam'"),
    (["methods=[grad_cam, grad_cam]"], r"methods: grad_cam named more than once"),
    (["concepts.layers=[blocks.1, blocks.1]"], r"concepts\.layers: blocks\.1 named more than once"),
    (["concepts.extractors=[sae, sae]"], r"concepts\.extractors: sae named more than once"),
    (["concepts.layers=blocks.1"], r"concepts\.layers: expected a list, got 'blocks\.1'"),
    (["model=3"], r"model: expected a mapping of keys, got 3"),
    (["parts.backbone=3"], r"parts\.backbone: expected a mapping of keys, got 3"),
    (["model.create_args=3"], r"model\.create_args: expected a mapping of keys, got 3"),
    (["dataset.path=/x"], r"dataset: kind 'demo' draws its own images: remove path"),
    (["dataset.kind=folder"], r"dataset: kind 'folder' needs a path: set dataset\.path"),
    (["dataset.kind=tar"], r"dataset\.kind: .+'parquet' or 'demo', got 'tar'"),
    (["dataset={kind: parquet, path: a, masks: b}"], "kind 'parquet' reads no masks"),
    (["dataset.limit=0"], r"dataset\.limit: .+ greater than or equal to 1, got 0"),
    (["dataset.limit=many"], r"dataset\.limit: .+ valid integer.+ got 'many'"),
    (["parts.k=255"], r"parts\.k: .+ less than or equal to 254, got 255"),
    (["parts.parser=masks"], r"parts\.parser: 'masks' reads files: set dataset\.masks"),
    (["truth.masks=a"], r"truth: kind 'demo' knows what it draws: remove masks and boxes"),
    (["dataset={kind: parquet, path: a}", "truth.masks=b"], r"truth\.masks: .+ got dataset\.kind parquet"),
    (
        ["dataset={kind: folder, path: a}", "truth={masks: b, boxes: c}"],
        r"truth: expected masks or boxes, got both",
    ),
    (["truth.foreground=[1]"], r"truth: foreground and ignore are values of masks: set truth\.masks"),
    (["truth.ignore=[1]"], r"truth: foreground and ignore are values of masks: set truth\.masks"),
    (["truth={masks: b, foreground: {a: [2]}, ignore: [1, 2]}"], r"truth: .+ got \[2\] in both"),
    (["truth={masks: b, foreground: 1}"], r"truth\.foreground: expected a list of mask values .+ got 1"),
    (["truth={masks: b, foreground: [256]}"], r"truth\.foreground: .+ from 0 to 255, .+ got \[256\]"),
    (["truth={masks: b, foreground: [true]}"], r"truth\.foreground: .+ got \[True\]"),
    (["truth={masks: b, foreground: {a: []}}"], r"truth\.foreground: .+ got \[\]"),
    (["truth={masks: b, foreground: {}}"], r"truth\.foreground: .+ got \{\}"),
    (["truth={masks: b, ignore: [-1]}"], r"truth\.ignore\.0: .+ got -1"),
    (["truth.mask=a"], r"truth\.mask: unknown key; did you mean 'masks'"),
    (["target=top2"], r"target: .+'top1' or 'label', got 'top2'"),
    (["run.max_bad_fraction=2"], r"run\.max_bad_fraction: .+ got 2"),
    (["name=a/b"], r"name: .+ got 'a/b'"),
    (["name=a{b}"], r"name: .+ got 'a\{b\}'"),
    (["methods"], r"--set: expected key\.path=value, got 'methods'"),
    (["methods=[a"], r"--set methods: expected a YAML value, got '\[a'"),
    (["target.x.y=1"], r"target"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_is_wrong_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, overrides)


def test_mask_values_by_class_survive_json() -> None:
    truth = "truth={masks: m, foreground: {tench: [3], 4: [5, 6]}, ignore: [255]}"
    config = load_config(None, ["dataset={kind: folder, path: x}", truth])
    assert config.truth.foreground == {"tench": (3,), "4": (5, 6)}
    assert config.truth.values_on_objects == {3, 5, 6}
    assert StudyConfig.model_validate_json(config.model_dump_json()) == config
    assert StudyConfig.model_validate(config.model_dump()).identity() == config.identity()


def test_all_wrong_keys_are_told_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)target: .+run\.seed: "):
        load_config(None, ["target=x", "run.seed=y"])


def test_a_file_names_the_study_and_anchors_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    document = {
        "dataset": {"kind": "folder", "path": "../images"},
        "model": {"name": "m", "checkpoint": "w.safetensors"},
    }
    (tmp_path / "sub" / "my study.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("sub/my study.yaml"), ["dataset.masks=masks", "truth.boxes=b.csv"], limit=5)
    assert config.name == "my_study"
    assert config.dataset.path == str(tmp_path / "images")
    assert config.model.checkpoint == str(tmp_path / "sub" / "w.safetensors")
    assert config.dataset.masks == str(tmp_path / "masks")
    assert config.truth.boxes == str(tmp_path / "b.csv")
    assert config.dataset.limit == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a YAML file, got no file"),
        (b"a: [", "is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"- a", "expected a mapping of keys in .+ got list"),
        (b"", "expected a mapping of keys in .+ got NoneType"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_a_list_entry_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("methods: [grad_cam, kl_hessian]\n")
    config = load_config(tmp_path / "s.yaml", ["methods.1={name: kl_hessian, gamma: 2.0}"])
    assert [one.id for one in config.methods] == ["grad_cam", "kl_hessian[gamma=2.0]"]
    with pytest.raises(UsageError, match=r"methods\.7: expected a position below 2, got '7'"):
        load_config(tmp_path / "s.yaml", ["methods.7=grad_cam"])


def test_how_and_where_a_study_is_computed_is_not_part_of_its_identity() -> None:
    base = load_config(None).identity()
    assert load_config(None, ["run.batch_size=1", "run.device=cpu", "compute.workers=3"]).identity() == base
    for other in ("run.seed=1", "run.precision=bf16", "target=label", "dataset.images=3"):
        assert load_config(None, [other]).identity() != base
