"""Two stages of learning: what learns, what stays, what is refused, and that importance finds what decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.xai_core.inherent.small import PATCH, built, bytes_of, labels_of, saved
from xai_core.errors import UsageError
from xai_core.inherent import load_importance
from xai_core.inherent.objectives import ArchitectureObjective, HeirOptions
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.registry import NoOptions, build_options
from xai_core.training import Recipe, Training, kinds, read_trained

MASKED: dict[str, dict[str, float]] = {"ea": {}, "pa": {"threshold": 0.5}}


@pytest.fixture
def ia_file(tmp_path: Path) -> Path:
    return saved(built("ia"), tmp_path / "ia.safetensors")


def heir(kind: str, file: Path, **arguments: object) -> tuple[Classifier, ArchitectureObjective]:
    model = built(kind, seed=7, **MASKED[kind], **arguments)
    return model, kinds.get(kind).function(model, HeirOptions(str(file)))


def first_stage() -> tuple[Classifier, ArchitectureObjective]:
    model = built("ia")
    return model, kinds.get("ia").function(model, NoOptions())


def steps(objective: ArchitectureObjective, count: int = 3, **recipe: object) -> None:
    training = Training(
        objective, bytes_of(12), labels_of(12), Recipe(epochs=count, batch_size=12, shift=0, **recipe)
    )
    training.advance()


@pytest.mark.parametrize("kind", ["ea", "pa"])
def test_inherited_importance_stays_and_the_rest_learns(kind: str, ia_file: Path) -> None:
    model, objective = heir(kind, ia_file)
    source = load_importance(ia_file)
    before = {name: values.clone() for name, values in model.module.state_dict().items()}
    for name, values in source.importance_net.state_dict().items():
        assert torch.equal(before[f"importance_net.{name}"], values)
    if kind == "ea":
        for name, values in source.component_net.state_dict().items():
            assert torch.equal(before[f"component_net.{name}"], values)
    # What a careless loop would do.
    objective.trained.train().requires_grad_(True)
    steps(objective)
    after = objective.trained.state_dict()
    for name, values in before.items():
        frozen = name.startswith("importance_net.")
        assert torch.equal(values, after[name]) == frozen, name
    assert all(parameter.grad is None for parameter in objective.trained.importance_net.parameters())
    assert not objective.trained.train().importance_net.training


def test_everything_of_an_ia_learns() -> None:
    model, objective = first_stage()
    before = {name: values.clone() for name, values in model.module.state_dict().items()}
    steps(objective)
    assert all(not torch.equal(values, objective.trained.state_dict()[name]) for name, values in before.items())


def test_loss_and_measure_from_their_definitions(ia_file: Path) -> None:
    for kind in ("ia", "ea", "pa"):
        model, objective = heir(kind, ia_file) if kind != "ia" else first_stage()
        objective.trained.eval()
        pictures, labels = bytes_of().float() / 255, labels_of()
        with torch.no_grad():
            logits = model(model.normalise(pictures))
            loss, logged = objective.loss(pictures, labels, 0.0, torch.Generator())
            measured = objective.measure(pictures, labels)
        each = -logits.log_softmax(dim=1)[torch.arange(7), labels]
        right = (logits.argmax(dim=1) == labels).float()
        importance = model.module.importance(model.normalise(pictures))
        torch.testing.assert_close(measured["loss"], each)
        torch.testing.assert_close(loss, each.mean())
        torch.testing.assert_close(measured["score"], right)
        torch.testing.assert_close(logged["accuracy"], right.mean())
        torch.testing.assert_close(measured["importance"], importance.mean(dim=(1, 2)))
        assert ("masked" in measured) == (kind == "pa")
        if kind == "pa":
            torch.testing.assert_close(measured["masked"], (importance < 0.5).float().mean(dim=(1, 2)))
            assert 0 < measured["masked"].mean() < 1


def test_a_file_rebuilds_its_network(tmp_path: Path, ia_file: Path) -> None:
    for kind in ("ea", "pa"):
        model, objective = heir(kind, ia_file)
        steps(objective, 1)
        file = saved(model, tmp_path / f"{kind}.safetensors", kind, checkpoint=str(ia_file))
        config = read_trained(file, kinds=(kind,))[1]["config"]
        pictures = model.normalise(bytes_of().float() / 255)
        model.module.eval()
        # Without arguments the file's own are taken.
        for arguments in (config["create_args"], {}):
            again = load_classifier(ModelSpec(config["name"], False, str(file), arguments))
            with torch.no_grad():
                assert torch.equal(again(pictures), model(pictures))
        assert len(config["importance"]) == 64


def test_pa_without_a_threshold_needs_no_importance(ia_file: Path) -> None:
    entry = kinds.get("pa")
    model = built("pa")
    objective = entry.function(model, HeirOptions())
    steps(objective, 1)
    assert entry.config(model, HeirOptions())["importance"] is None
    with pytest.raises(UsageError, match=r"expected none for PA\(p, 0\)"):
        entry.function(built("pa"), HeirOptions(str(ia_file)))


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("ea", {"patch_size": 8}, "expected an IA with patch_size 8, got one with 4"),
        ("ea", {"embed_dim": 8}, "expected an IA with embed_dim 8, got one with 6"),
        ("ea", {"std": [0.5, 0.5, 0.5]}, "expected an IA with std"),
        ("pa", {"patch_size": 8}, "expected an IA with patch_size 8, got one with 4"),
        ("pa", {"importance_mean": [0.5, 0.5, 0.5]}, "set importance_mean in model.create_args"),
        ("pa", {"importance_width": 2}, "expected an IA with importance_width 2, got one with 4"),
    ],
)
def test_another_ia_is_refused(kind: str, arguments: dict[str, object], told: str, ia_file: Path) -> None:
    with pytest.raises(UsageError, match=told):
        heir(kind, ia_file, **arguments)


def test_wrong_models_and_files_are_refused(tmp_path: Path, ia_file: Path) -> None:
    for kind in ("ea", "pa"):
        with pytest.raises(UsageError, match="checkpoint: expected the file of a trained IA"):
            kinds.get(kind).function(built(kind, **MASKED[kind]), HeirOptions())
    with pytest.raises(UsageError, match=r"model\.name: expected vitrine_ia, got vitrine_ea"):
        kinds.get("ia").function(built("ea"), NoOptions())
    with pytest.raises(UsageError, match=r"model\.name: expected vitrine_pa, got vitrine_ia"):
        kinds.get("pa").function(built("ia"), HeirOptions())
    with pytest.raises(UsageError, match="expected one of kind ia, got kind ea"):
        heir("ea", saved(heir("ea", ia_file)[0], tmp_path / "ea.safetensors", "ea", checkpoint=str(ia_file)))
    model = load_classifier(ModelSpec("vitrine_ia", False, transform={"mean": (0.1, 0.2, 0.3)}))
    with pytest.raises(UsageError, match=r"model\.transform\.mean: expected .* got \(0\.1, 0\.2, 0\.3\)"):
        kinds.get("ia").config(model, build_options(kinds.get("ia"), {}))


def coloured_scenes(count: int) -> tuple[Tensor, Tensor]:
    """Every patch in the colour of some class: the label is that of the patch in row 1, column 2."""
    generator = torch.Generator().manual_seed(4)
    colours = torch.randint(3, (count, 4, 4), generator=generator)
    planes = torch.nn.functional.one_hot(colours, 3).permute(0, 3, 1, 2) * 120 + 60
    large = planes.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3)
    return (large + torch.randint(60, large.shape, generator=generator)).byte(), colours[:, 1, 2]


def test_importance_learns_which_patch_decides_where_patches_look_alike() -> None:
    pictures, labels = coloured_scenes(512)
    model = built("ia", lively=False, component_width=8)
    objective = kinds.get("ia").function(model, NoOptions())
    recipe = Recipe(epochs=8, batch_size=32, learning_rate=1e-2, shift=0, mirror=False)
    training = Training(objective, pictures[128:], labels[128:], recipe, held_out=(pictures[:128], labels[:128]))
    training.advance()
    score = max(row.value for row in training.log if (row.split, row.name) == ("held_out", "score"))
    model.module.load_state_dict(training.weights())
    with torch.no_grad():
        importance = model.module.importance(model.normalise(pictures[:128].float() / 255)).mean(dim=0)
    assert score > 0.8
    assert importance[1, 2] > 2 * importance.mean()
