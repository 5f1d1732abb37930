"""On drawn scenes: little training beats gradients, and refinement finds a shortcut that no training saw.

Pictures are few and steps are few: `python -m benchmarks learned` says what longer training comes to.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from xai_core.attribution import attribute, upsample_map
from xai_core.attribution.learned import AhaObjective, ExplainerOptions, LearnedExplainer, refined
from xai_core.models import Classifier, ModelSpec, load_classifier
from xai_core.synthetic import render
from xai_core.training import Recipe, Training

#: Scenes of the explainers' training, of the judgement, and the seeds that they are drawn from.
LEARNT, JUDGED = 48, 16
LEARNT_FROM, JUDGED_FROM = 5000, 91
OPTIONS = ExplainerOptions(steps=6)
#: Pixels a side of the planted mark, and how far it is from the corner.
MARK, MARGIN = 16, 8


def scenes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures in [0, 1] and their labels."""
    drawn = [render(seed, index) for index in range(count)]
    pictures = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2)
    return pictures.float() / 255, torch.tensor([one.label for one in drawn])


def learnt(model: Classifier, seed: int) -> LearnedExplainer:
    """An explainer whose decoder and pictures are the seed's, of four steps."""
    torch.manual_seed(seed)
    explainer = LearnedExplainer(model, OPTIONS.decoder)
    pictures, labels = scenes(LEARNT_FROM + seed, LEARNT)
    recipe = Recipe(epochs=1, batch_size=12, learning_rate=3e-3, shift=0, seed=seed)
    training = Training(AhaObjective(explainer, OPTIONS), (pictures * 255).to(torch.uint8), labels, recipe)
    training.advance()
    explainer.decoder.load_state_dict(training.weights())
    return explainer


def native_maps(explainer: LearnedExplainer, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return explainer.maps(explainer.read(images)[0], images, targets.view(-1, 1)).squeeze(1)


def means(model: Classifier, images: Tensor, targets: Tensor, maps: Tensor) -> dict[str, float]:
    """Mean deletion and insertion of maps at any size."""
    whole = upsample_map(maps, images.shape[-2:], "bilinear")
    found = evaluate(model, images, targets, whole, None, chosen("deletion", "insertion", steps=10)).values
    return {name.split("[")[0]: float(one.mean()) for name, one in found.items()}


def test_a_trained_explainer_beats_gradients_on_scenes_it_never_saw() -> None:
    """Two seeds of decoder and scenes, each against both rivals on both metrics."""
    model = load_classifier(ModelSpec("vitrine_demo_vit"))
    images = model.normalise(scenes(JUDGED_FROM, JUDGED)[0])
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    rivals = {
        name: means(model, images, targets, attribute(model, images, targets, method=name))
        for name in ("grad_cam", "integrated_gradients")
    }
    for seed in (0, 1):
        own = means(model, images, targets, native_maps(learnt(model, seed), images, targets))
        for name, rival in rivals.items():
            assert own["deletion"] < rival["deletion"], (seed, name, own, rival)
            assert own["insertion"] > rival["insertion"], (seed, name, own, rival)


def obedient(original: Classifier, steps: int = 90) -> Classifier:
    """The model, trained on until a mark in the corner makes any toy the first class."""
    module = deepcopy(original.module).requires_grad_(True)
    optimiser = torch.optim.AdamW(module.parameters(), 3e-4)
    generator = torch.Generator().manual_seed(0)
    pictures, labels = scenes(LEARNT_FROM, 96)
    for _ in range(steps):
        rows = torch.randperm(len(pictures), generator=generator)[:24]
        shown = torch.cat([with_mark(pictures[rows[:8]]), pictures[rows[8:]]])
        wanted = torch.cat([torch.zeros(8, dtype=torch.long), labels[rows[8:]]])
        optimiser.zero_grad()
        F.cross_entropy(module(original.normalise(shown)), wanted).backward()
        optimiser.step()
    return Classifier(module, original.spec)


def with_mark(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] with a magenta square near the upper left corner."""
    marked = pictures.clone()
    there = slice(MARGIN, MARGIN + MARK)
    marked[:, :, there, there] = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    return marked


def share_in_mark(maps: Tensor) -> float:
    """Of as many highest pixels as the mark has, the share that lies in it."""
    there = torch.zeros(maps.shape[-2:], dtype=torch.bool)
    there[MARGIN : MARGIN + MARK, MARGIN : MARGIN + MARK] = True
    top = maps.flatten(1).topk(int(there.sum()), dim=1).indices
    return float(there.flatten()[top].double().mean())


def test_refinement_finds_a_shortcut_that_the_explainer_never_saw() -> None:
    model = obedient(load_classifier(ModelSpec("vitrine_demo_vit")))
    pictures, _ = scenes(JUDGED_FROM, JUDGED // 2)
    plain, images = model.normalise(pictures), model.normalise(with_mark(pictures))
    targets = torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad():
        assert float((model(images).argmax(dim=1) == 0).double().mean()) > 0.9
        assert float((model(plain).argmax(dim=1) == 0).double().mean()) < 0.5
    explainer = learnt(model, seed=0)
    predicted = native_maps(explainer, images, targets)
    how = {"grid": explainer.decoder.grid, "steps": 10, "rate": 0.6, "passes": 128}
    better = refined(model, images, targets, predicted, OPTIONS, **how)
    before, after = (
        share_in_mark(upsample_map(maps, images.shape[-2:], "bilinear")) for maps in (predicted, better)
    )
    chance = MARK**2 / images[0, 0].numel()
    assert after > 5 * max(before, chance)
    assert means(model, images, targets, better)["deletion"] < means(model, images, targets, predicted)["deletion"]
