"""The decoder and its objective: what learns, what stays, and that little training beats what it should."""

from __future__ import annotations

import pytest
import torch

from tests.xai_core.attribution.learned.small import CONFIG, explainer_of
from tests.xai_core.attribution.untouched import state_of
from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution import upsample_map
from xai_core.attribution.learned import AhaObjective, ExplainerOptions, LearnedExplainer
from xai_core.attribution.learned.decoder import DecoderConfig, class_vectors, completed, default_layers
from xai_core.errors import UsageError
from xai_core.models import ModelSpec, load_classifier
from xai_core.training import Recipe, Training, kinds

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
OPTIONS = {"grid": 4, "width": 8, "blocks": 1, "guide": 4, "stride": 2, "steps": 4}


def batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = pictures(count)
    return images.sigmoid(), labels


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranking", [{}, {"ranking": "cells", "cells": 4}, {"straight_through": True}], ids=str)
def test_gradients_reach_the_whole_decoder_and_nothing_else(name: str, ranking: dict) -> None:
    model = MODELS[name]()
    objective = AhaObjective(explainer_of(model), ExplainerOptions(**OPTIONS, **ranking))
    before = state_of(model.module)
    loss, scalars = objective.loss(*batch(), 0.5, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == pytest.approx(float(scalars["deletion"] - scalars["insertion"]), abs=1e-9)
    assert all(float(one.grad.abs().sum()) > 0 for one in objective.trained.parameters())
    assert state_of(model.module) == before


def test_the_loss_depends_on_progress_and_chance_as_it_should() -> None:
    objective = AhaObjective(explainer_of(tiny_vit()), ExplainerOptions(**OPTIONS))

    def value(progress: float, seed: int) -> float:
        return float(objective.loss(*batch(), progress, torch.Generator().manual_seed(seed))[0])

    assert value(0.0, 0) == value(0.0, 0) != value(0.0, 1)
    assert value(0.5, 0) != value(0.0, 0)
    # At the end there is no noise left.
    assert value(1.0, 0) == value(1.0, 1)


def test_held_out_areas_are_the_metrics_of_the_hard_order() -> None:
    model = tiny_vit()
    objective = AhaObjective(explainer_of(model), ExplainerOptions(**OPTIONS, target="label"))
    shown, labels = batch()
    images = model.normalise(shown)
    found = objective.measure(shown, labels)
    with torch.no_grad():
        explainer = objective.explainer
        maps = explainer.maps(explainer.read(images)[0], images, labels.view(-1, 1)).squeeze(1)
    full = upsample_map(maps, (SIZE, SIZE), "nearest")
    exact = evaluate(model, images, labels, full, None, chosen("deletion", "insertion", steps=4)).values
    deletion, insertion = exact.values()
    torch.testing.assert_close(found["deletion"], deletion, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["insertion"], insertion, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["score"], insertion - deletion, rtol=0, atol=1e-9)


def test_the_target_is_the_models_own_or_the_label() -> None:
    model = tiny_vit()
    shown, _ = batch()
    top = model(model.normalise(shown)).argmax(dim=1)
    own = AhaObjective(explainer_of(model), ExplainerOptions(**OPTIONS)).measure(shown, (top + 1) % CLASSES)
    labelled = AhaObjective(explainer_of(model), ExplainerOptions(**OPTIONS, target="label"))
    assert torch.equal(own["score"], labelled.measure(shown, top)["score"])
    assert not torch.equal(own["score"], labelled.measure(shown, (top + 1) % CLASSES)["score"])
    entry = kinds.get("aha")
    assert [entry.reads_labels(ExplainerOptions(target=one)) for one in ("top1", "label")] == [False, True]


def test_a_class_is_its_row_of_the_classifier() -> None:
    model = tiny_cnn()
    assert torch.equal(class_vectors(model), model.module.fc.weight)
    headless = load_classifier(ModelSpec("resnet10t", False, create_args={"num_classes": 0}))
    with pytest.raises(UsageError, match="a row of weights for each"):
        class_vectors(headless)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "densenet121"]
)
def test_other_architectures_are_read(name: str) -> None:
    size = {} if name == "densenet121" else {"img_size": 64}
    transform = {} if size else {"input_size": (3, 64, 64)}
    model = load_classifier(ModelSpec(name, False, create_args={"num_classes": 3, **size}, transform=transform))
    explainer = LearnedExplainer(model, CONFIG)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = explainer.maps(explainer.read(images)[0], images, torch.tensor([[0, 1], [1, 2]]))
    assert maps.shape == (2, 2, 32, 32)


def test_layers_are_the_ones_that_the_family_has() -> None:
    assert default_layers(tiny_vit()) == ("blocks.0", "blocks.1")
    assert default_layers(tiny_cnn()) == ("layer1", "layer2", "layer3", "layer4")
    assert completed(DecoderConfig(), tiny_vit()).grid == 4
    with pytest.raises(UsageError, match=r"layer 'blocks\.9'"):
        LearnedExplainer(tiny_vit(), DecoderConfig(layers=("blocks.9",)))


def test_it_learns_a_better_order_in_seconds() -> None:
    """A handful of steps on noise pictures: the score of a new decoder rises on others, too."""
    model = tiny_vit()
    model.module.float()
    torch.manual_seed(0)
    options = ExplainerOptions(**OPTIONS)
    objective = AhaObjective(LearnedExplainer(model, options.decoder), options)
    shown, held_out = (batch(64)[0] * 255).to(torch.uint8).split(32)
    others, labels = held_out.float() / 255, torch.zeros(32, dtype=torch.long)
    before = objective.measure(others, labels)["score"].mean()
    recipe = Recipe(epochs=6, batch_size=8, learning_rate=1e-2, shift=0, mirror=False)
    Training(objective, shown, labels, recipe).advance()
    after = objective.measure(others, labels)["score"].mean()
    assert float(after) > float(before) + 0.01
