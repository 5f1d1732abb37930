"""The method ``aha``: what every method must hold, and that its file belongs to one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.xai_core.attribution.learned.small import checkpoint_of, explainer_of
from tests.xai_core.attribution.untouched import state_of
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.learned import AreaOptions, refined
from xai_core.attribution.learned.checkpoint import trained_decoder
from xai_core.attribution.learned.method import AhaOptions
from xai_core.attribution.learned.objective import signed
from xai_core.attribution.learned.trajectory import areas, make_scene
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import variant_id
from xai_core.training import digest_of

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn, "relu_cnn": tiny_relu_cnn}


class Explained:
    """A tiny model in float32 with a file of a decoder of random weights."""

    def __init__(self, name: str, folder: Path, **options: object) -> None:
        self.model: Classifier = MODELS[name]()
        self.model.module.float()
        self.images, self.targets = pictures(3)
        self.images = self.images.float()
        self.path = checkpoint_of(self.model, folder / "aha.safetensors")
        self.options = {"checkpoint": str(self.path), **options}

    def __call__(self, images: Tensor | None = None, **more: object) -> Tensor:
        images = self.images if images is None else images
        targets = self.targets[: len(images)]
        return attribute(self.model, images, targets, method="aha", options=self.options, **more)


REFINED = {"refine": 2, "refine_rate": 0.3}
both = pytest.mark.parametrize("options", [{}, REFINED], ids=["predicted", "refined"])


@both
@pytest.mark.parametrize("name", MODELS)
def test_batch_size_and_neighbours_change_nothing(name: str, options: dict, tmp_path: Path) -> None:
    explain = Explained(name, tmp_path, **options)
    together = explain(batch_size=8)
    assert together.shape == (3, SIZE, SIZE)
    assert torch.isfinite(together).all()
    assert explain(native=True).shape == (3, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(explain(batch_size=1), together, rtol=0, atol=2e-4)
    torch.testing.assert_close(explain(explain.images[:1]), together[:1], rtol=0, atol=2e-4)


@both
def test_several_classes_share_the_pass(options: dict, tmp_path: Path) -> None:
    explain = Explained("vit", tmp_path, **options)
    classes = torch.tensor([[0, 3], [1, 4], [2, 0]])
    how = {"method": "aha", "options": explain.options}
    together = attribute_classes(explain.model, explain.images, classes, batch_size=4, **how)
    for column in range(2):
        single = attribute(explain.model, explain.images, classes[:, column], **how)
        torch.testing.assert_close(together[:, column], single, rtol=0, atol=2e-4)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-3)


@both
def test_a_map_is_an_order_from_its_least_relevant_place_up(options: dict, tmp_path: Path) -> None:
    explain = Explained("vit", tmp_path, **options)
    maps = explain(native=True).flatten(1)
    assert maps.amin(dim=1).tolist() == [0.0] * len(maps)
    assert bool((maps.amax(dim=1) > 0).all())
    if not options:
        decoded = trained_decoder(explain.model, str(explain.path)).bound(explain.model)
        with torch.no_grad():
            features, _ = decoded.read(explain.images)
            scores = decoded.maps(features, explain.images, explain.targets.view(-1, 1)).flatten(1)
        assert bool((scores.amin(dim=1) < 0).any())
        torch.testing.assert_close(maps, scores - scores.amin(dim=1, keepdim=True), rtol=0, atol=1e-6)


@both
def test_the_model_the_modes_and_the_chance_are_left_alone(options: dict, tmp_path: Path) -> None:
    explain = Explained("vit", tmp_path, **options)
    before, chance = state_of(explain.model.module), torch.get_rng_state()
    usual = explain()
    assert state_of(explain.model.module) == before
    assert torch.equal(torch.get_rng_state(), chance)
    assert not usual.requires_grad
    with torch.inference_mode():
        assert torch.equal(explain(explain.images.clone()).clone(), usual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(explain(), usual)
    half = explain(precision="bf16")
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()


def test_the_id_names_the_content_not_the_path(tmp_path: Path) -> None:
    explain = Explained("vit", tmp_path)
    digest = digest_of(explain.path)[:12]
    assert variant_id("aha", AhaOptions(str(explain.path))) == f"aha[checkpoint={digest}]"
    refined_id = variant_id("aha", AhaOptions(str(explain.path), refine=3))
    assert refined_id == f"aha[checkpoint={digest},refine=3]"
    assert variant_id("aha", AhaOptions()) == "aha"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"refine": -1}, "aha.refine"),
        ({"refine": 1, "refine_rate": 0.0}, "refine_rate"),
        ({"refine_rate": 1.0}, "reads it"),
    ],
)
def test_bad_options_are_refused(options: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        AhaOptions("some", **options)


def test_refinement_makes_no_image_worse_and_leaves_zero_steps_alone() -> None:
    model, options = tiny_vit(), AreaOptions(steps=4)
    images, targets = pictures(4)
    explainer = explainer_of(model)
    with torch.no_grad():
        maps = explainer.maps(explainer.read(images)[0], images, targets.view(-1, 1)).squeeze(1)

    def loss(some: Tensor) -> Tensor:
        scene = make_scene(model, images, targets, options.terms, 64, None)
        return signed(areas(scene, options.relaxed_shares(some, 1.0, None), options.terms, 64), options.terms)

    how = {"grid": 4, "rate": 0.3, "passes": 64}
    same = refined(model, images, targets, maps, options, steps=0, **how)
    assert torch.equal(same.flatten(1).argsort(1), maps.flatten(1).argsort(1))
    better = refined(model, images, targets, maps, options, steps=6, **how)
    gain = loss(maps) - loss(better)
    assert bool((gain >= -1e-9).all())
    assert float(gain.mean()) > 0
    # Steps so long that they lead away from anything good are not taken.
    wild = refined(model, images, targets, maps, options, steps=2, **{**how, "rate": 100.0})
    assert bool((loss(maps) - loss(wild) >= -1e-9).all())
