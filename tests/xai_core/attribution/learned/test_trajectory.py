"""Relaxed areas against the metrics, and their gradients against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn, tiny_vit
from xai_core.attribution.learned import AreaOptions, ExplainerOptions
from xai_core.attribution.learned.trajectory import Term, areas, hard_shares, make_scene
from xai_core.baselines import Baseline, make_baseline
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts import parse_parts

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
CELLS = 4


def random_maps(count: int, side: int = CELLS) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, side, side, generator=generator, dtype=torch.float64)


def relaxed(model: Classifier, maps: Tensor, options: AreaOptions, passes: int = 64) -> Tensor:
    images, targets = pictures(len(maps))
    scene = make_scene(model, images, targets, options.terms, passes, None)
    return areas(scene, options.relaxed_shares(maps, 1.0, None), options.terms, passes)


def metric(
    model: Classifier, maps: Tensor, names: tuple[str, ...], parts: Tensor | None = None, **options: object
):
    images, targets = pictures(len(maps))
    full = maps.repeat_interleave(SIZE // maps.shape[1], 1).repeat_interleave(SIZE // maps.shape[2], 2)
    found = evaluate(model, images, targets, full, parts, chosen(*names, **options))
    return torch.stack(list(found.values.values()), dim=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("baseline", ["blur", "black"])
@pytest.mark.parametrize(
    "ranking", [{"ranking": "map"}, {"ranking": "cells", "cells": CELLS}], ids=["map", "cells"]
)
def test_the_relaxed_area_tends_to_the_metric(name: str, baseline: str, ranking: dict) -> None:
    """Steps that divide the cells: then pixels of one score are replaced together, as regions are."""
    model, maps = MODELS[name](), random_maps(3)
    exact = metric(model, maps, ("deletion", "insertion"), steps=8, baseline=baseline)
    far = []
    for temperature in (1.0, 0.1, 1e-6):
        options = AreaOptions(
            **ranking,
            steps=8,
            deletion=baseline,
            insertion=baseline,
            final_temperature=temperature,
            temperature=1.0,
        )
        far.append(float((relaxed(model, maps, options) - exact).abs().amax()))
    assert far[0] > 2e-5
    assert far[-1] < 1e-8


def test_the_hard_area_is_the_metric_of_parts() -> None:
    """A step a cell: the area restricted to regions is P-Del and P-Ins of the grid's parts."""
    model, maps = tiny_vit(), random_maps(3)
    images, targets = pictures(3)
    parts = parse_parts(model, images.float(), parser="grid", k=CELLS**2)
    exact = metric(model, maps, ("p_deletion", "p_insertion"), parts=parts, baseline="mean")
    terms = (Term("image", Baseline("mean"), 1.0), Term("baseline", Baseline("mean"), -1.0))
    scene = make_scene(model, images, targets, terms, 64, None)
    taken = hard_shares(maps.flatten(1), CELLS**2).unflatten(2, maps.shape[-2:])
    found = areas(scene, taken, terms, 64)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def slow_area(model: Classifier, cells: Tensor, image: Tensor, target: Tensor, insertion: bool) -> float:
    """One image, cell by cell, by the metric's own words: the probability over the fraction of pixels."""
    side, filled = len(cells), make_baseline(Baseline("blur"), model, image[None])[0]
    owner = [[row * side // SIZE * side + column * side // SIZE for column in range(SIZE)] for row in range(SIZE)]
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    states = [mask.clone()]
    for cell in cells.flatten().argsort(descending=True).tolist():
        mask |= torch.tensor(owner) == cell
        states.append(mask.clone())
    start, end = (filled, image) if insertion else (image, filled)
    shown = torch.stack([torch.where(state, end, start) for state in states])
    probability = model(shown).softmax(dim=1)[:, target]
    fractions = torch.tensor([float(state.sum()) / SIZE**2 for state in states], dtype=torch.float64)
    return float(torch.trapezoid(probability, fractions))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cells", [3, 5, 7])
def test_cells_that_do_not_divide_the_picture_weigh_as_their_pixels(name: str, cells: int) -> None:
    model, maps = MODELS[name](), random_maps(3, cells)
    images, targets = pictures(3)
    options = AreaOptions(ranking="cells", cells=cells, steps=cells**2, temperature=1.0, final_temperature=1e-6)
    slow = [
        [slow_area(model, *one, insertion) for insertion in (False, True)]
        for one in zip(maps, images, targets, strict=True)
    ]
    found = relaxed(model, maps, options)
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranking", [{}, {"ranking": "cells", "cells": 3}], ids=["map", "cells"])
def test_gradients_reach_the_map_through_model_and_order(ranking: dict) -> None:
    model = tiny_cnn()
    options = AreaOptions(steps=3, final_temperature=0.2, **ranking)
    maps = random_maps(2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: relaxed(model, one, options), maps, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_the_number_of_pictures_in_a_pass_changes_nothing() -> None:
    model, options = tiny_vit(), AreaOptions(steps=4)
    found = []
    for passes in (3, 64):
        maps = random_maps(3).requires_grad_(True)
        value = relaxed(model, maps, options, passes)
        (gradient,) = torch.autograd.grad(value[:, 0].sum(), maps)
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_least_relevant_first_is_the_positive_order_backwards() -> None:
    """Why the negative order is refused with one baseline: its areas are those of the positive order."""
    model, maps = tiny_vit(), random_maps(2)
    positive = metric(model, maps, ("deletion", "insertion"), steps=8)
    negative = metric(model, -maps, ("deletion", "insertion"), steps=8)
    torch.testing.assert_close(positive, negative.flip(1), rtol=0, atol=1e-9)
    with pytest.raises(UsageError, match="negative_order"):
        AreaOptions(negative_order=True)
    terms = AreaOptions(deletion="black", negative_order=True).terms
    assert [(term.start, term.baseline.kind, term.sign) for term in terms] == [
        ("image", "black", 1.0),
        ("baseline", "blur", -1.0),
        ("image", "blur", 1.0),
        ("baseline", "black", -1.0),
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranking": "pixels"}, "map or cells"),
        ({"ranking": "cells", "cells": 29}, "2 to 28"),
        ({"cells": 7}, "nothing reads it"),
        ({"steps": 1}, "at least 2"),
        ({"temperature": 0.01}, "final_temperature"),
        ({"final_temperature": 0.0}, "final_temperature"),
        ({"noise": -1.0}, "noise"),
        ({"iterations": 0}, "aha.iterations"),
        ({"deletion": "white"}, "aha.deletion"),
        ({"sigma": 3.0, "deletion": "black", "insertion": "mean"}, "aha.sigma"),
        ({"target": "top5"}, "aha.target"),
        ({"passes": 0}, "aha.passes"),
        ({"grid": 1}, "aha.grid"),
        ({"stride": 0}, "aha.stride"),
    ],
)
def test_bad_options_are_refused(options: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ExplainerOptions(**options)
