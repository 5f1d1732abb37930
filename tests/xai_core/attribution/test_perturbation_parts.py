"""Kernel SHAP against Shapley values from their definition, LIME against a plain ridge regression."""

from __future__ import annotations

from itertools import combinations
from math import factorial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes, score_parts
from xai_core.attribution.perturbation.coalitions import Players, part_means
from xai_core.attribution.perturbation.kernel_shap import KernelShapOptions, shapley_design, weighted_coalitions
from xai_core.attribution.perturbation.lime import LimeOptions, lime_design
from xai_core.models import Classifier
from xai_core.registry import methods

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}


def bands(count: int, images: int) -> Tensor:
    """Horizontal bands of unequal height, some of them of two pieces."""
    row = (torch.arange(SIZE) * 3 // 2) % count
    return row.view(1, -1, 1).expand(images, SIZE, SIZE).to(torch.uint8).contiguous()


def shown(image: Tensor, behind: Tensor, labels: Tensor, coalition: set[int], parts: set[int]) -> Tensor:
    """Pixels of no part are masked where the last part is, that is where none is shown."""
    if not coalition:
        return behind
    keep = torch.ones(labels.shape, dtype=torch.bool)
    for part in parts - coalition:
        keep[labels == part] = False
    return torch.where(keep, image, behind)


def value(model: Classifier, picture: Tensor, target: int, scalar: str) -> float:
    with torch.no_grad():
        logits = model(picture.unsqueeze(0))[0]
    return float((logits.softmax(0) if scalar == "probability" else logits)[target])


def shapley(game, players: list[int]) -> dict[int, float]:  # type: ignore[no-untyped-def]
    """phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))."""
    n = len(players)
    phi = dict.fromkeys(players, 0.0)
    for i in players:
        others = [one for one in players if one != i]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for members in combinations(others, size):
                phi[i] += weight * (game({*members, i}) - game(set(members)))
    return phi


@pytest.mark.parametrize("scalar", ["logit", "probability"])
@pytest.mark.parametrize("family", MODELS)
def test_all_coalitions_give_the_shapley_values(family: str, scalar: str) -> None:
    """Images with four and three parts and one with a gap in its labels; the second has a corner of no part."""
    model = MODELS[family]()
    images, targets = pictures(3)
    parts = quarters(3)
    parts[2][parts[2] == 1] = 0
    options = {"baseline": "black", "scalar": scalar}
    scores = score_parts(model, images, targets, parts, method="kernel_shap", options=options, batch_size=5).score
    behind = model.normalise(torch.zeros_like(images[:1]))[0]
    for b, present in enumerate([{0, 1, 2, 3}, {0, 1, 2}, {0, 2, 3}]):
        image, target, labels = images[b], int(targets[b]), parts[b]

        def game(coalition: set[int], image=image, target=target, labels=labels, present=present) -> float:  # type: ignore[no-untyped-def]
            return value(model, shown(image, behind, labels, coalition, present), target, scalar)

        expected = shapley(game, sorted(present))
        for part in range(4):
            if part in present:
                assert float(scores[b, part]) == pytest.approx(expected[part], rel=1e-7, abs=1e-10)
            else:
                assert scores[b, part].isnan()
        total = value(model, image, target, scalar) - value(model, behind, target, scalar)
        assert float(scores[b].nansum()) == pytest.approx(total, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("players", [1, 2, 3, 5, 8])
def test_the_design_is_exact_for_any_game(players: int) -> None:
    design = shapley_design(players, KernelShapOptions(samples=2**players))
    assert len(design.coalitions) == 2**players == len(design.coalitions.unique(dim=0))
    values = torch.randn(2**players, generator=torch.Generator().manual_seed(players)).double()
    powers = 2 ** torch.arange(players)
    worth = {int((row * powers).sum()): float(one) for row, one in zip(design.coalitions, values, strict=True)}
    expected = shapley(lambda members: worth[sum(2**one for one in members)], list(range(players)))
    got = design.operator @ values
    torch.testing.assert_close(
        got, torch.tensor(list(expected.values()), dtype=torch.float64), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize(("players", "samples"), [(6, 20), (12, 26), (12, 500), (49, 100), (49, 2048), (200, 402)])
def test_a_sampled_design_is_exact_for_additive_games_and_always_efficient(players: int, samples: int) -> None:
    design = shapley_design(players, KernelShapOptions(samples=samples))
    assert len(design.coalitions) <= samples
    assert len(design.coalitions.unique(dim=0)) == len(design.coalitions)
    effects = torch.randn(players, generator=torch.Generator().manual_seed(0)).double()
    values = 0.3 + design.coalitions.double() @ effects
    torch.testing.assert_close(design.operator @ values, effects, rtol=1e-7, atol=1e-8)
    values = torch.randn(len(design.coalitions), generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close((design.operator @ values).sum(), values[1] - values[0])


def test_sampled_coalitions_stand_with_their_opposites_and_carry_the_kernels_mass() -> None:
    """Of 12 players, 498 coalitions complete the sizes 1 and 11 (24), 2 and 10 (132); the rest is drawn."""
    coalitions, weights = weighted_coalitions(12, 498, seed=0)
    weight = {tuple(row.tolist()): float(one) for row, one in zip(coalitions, weights, strict=True)}
    sizes = coalitions.sum(1)
    for row, one in weight.items():
        assert weight[tuple(not member for member in row)] == pytest.approx(one)
    counts = torch.bincount(sizes, minlength=13)
    assert counts[[1, 2, 10, 11]].tolist() == [12, 66, 66, 12]
    assert int(counts[3:10].sum()) <= 498 - 156
    for size in (1, 2, 10, 11):
        assert float(weights[sizes == size].sum()) == pytest.approx(11 / (size * (12 - size)))
    drawn = (sizes > 2) & (sizes < 10)
    assert float(weights[drawn].sum()) == pytest.approx(sum(11 / (k * (12 - k)) for k in range(3, 10)))


def test_a_sampled_fit_from_the_normal_equations() -> None:
    """One player is eliminated by the constraint; the rest is a plain weighted least-squares problem."""
    generator = torch.Generator().manual_seed(5)
    design = shapley_design(9, KernelShapOptions(samples=120))
    coalitions, weights = weighted_coalitions(9, 118, seed=0)
    assert torch.equal(design.coalitions[2:], coalitions)
    values = torch.rand(len(design.coalitions), generator=generator).double()
    nothing, everything = float(values[0]), float(values[1])
    z, y = coalitions.double().numpy(), values[2:].numpy() - nothing
    root = np.sqrt(weights.numpy())
    left = (z[:, :-1] - z[:, -1:]) * root[:, None]
    right = (y - z[:, -1] * (everything - nothing)) * root
    first = np.linalg.lstsq(left, right, rcond=None)[0]
    expected = torch.tensor([*first, everything - nothing - first.sum()], dtype=torch.float64)
    torch.testing.assert_close(design.operator @ values, expected, rtol=1e-8, atol=1e-10)


def test_more_samples_come_nearer_to_the_exact_values() -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    parts = bands(10, 1)
    given = {"method": "kernel_shap", "batch_size": 64}
    exact = score_parts(model, images, targets, parts, options={"samples": 1024}, **given).score
    for samples, error in ((64, 0.7), (256, 0.3), (512, 0.12)):
        for seed in range(3):
            options = {"samples": samples, "seed": seed}
            some = score_parts(model, images, targets, parts, options=options, **given).score
            assert not torch.equal(some, exact)
            assert float((some - exact).norm() / exact.norm()) < error
            torch.testing.assert_close(some.sum(), exact.sum())


def test_patches_are_parts_of_a_grid_and_fill_their_own_pixels() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    options = {"samples": 512}
    classes = torch.stack([targets, (targets + 1) % 5], dim=1)
    given = {"method": "kernel_shap_patches", "options": {**options, "grid": 3}}
    native = attribute_classes(model, images, classes, native=True, **given)
    full = attribute_classes(model, images, classes, **given)
    edges = (0, 11, 22, 32)
    labels = torch.full((2, SIZE, SIZE), 255, dtype=torch.uint8)
    for row in range(3):
        for column in range(3):
            place = (slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
            labels[:, place[0], place[1]] = 3 * row + column
            cell = native[:, :, row, column, None, None]
            torch.testing.assert_close(full[:, :, place[0], place[1]], cell.expand_as(full[:, :, *place]))
    for column in range(2):
        scores = score_parts(
            model, images, classes[:, column], labels, method="kernel_shap", options=options
        ).score
        torch.testing.assert_close(native[:, column].flatten(1).double(), scores, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("family", MODELS)
def test_lime_is_scikit_learns_ridge_on_every_draw(family: str, distance: str) -> None:
    """The package's rule, every drawn coalition forwarded and weighed by itself."""
    model = MODELS[family]()
    images, targets = pictures(2)
    parts = quarters(2)
    options = {
        "samples": 60,
        "distance": distance,
        "kernel_width": 0.8,
        "ridge": 0.05,
        "seed": 3,
        "baseline": "mean",
    }
    scores = score_parts(model, images, targets, parts, method="lime", options=options, batch_size=7).score
    for b, count in enumerate((4, 3)):
        generator = torch.Generator().manual_seed(3)
        drawn = torch.rand(60, count, generator=generator, dtype=torch.float64) < 0.5
        drawn[0] = True
        outcomes, weights = [], []
        for row in drawn:
            coalition = set(row.nonzero().flatten().tolist())
            picture = shown(images[b], torch.zeros_like(images[b]), parts[b], coalition, set(range(count)))
            outcomes.append(value(model, picture, int(targets[b]), "probability"))
            ones = torch.ones(count).double()
            if distance == "euclidean":
                far = float((ones - row.double()).norm())
            else:
                far = (
                    1.0 if not coalition else 1 - float(row.double() @ ones / (row.double().norm() * ones.norm()))
                )
            weights.append(float(np.sqrt(np.exp(-(far**2) / 0.8**2))))
        fit = Ridge(alpha=0.05).fit(drawn.double().numpy(), outcomes, sample_weight=weights)
        torch.testing.assert_close(scores[b, :count], torch.tensor(fit.coef_), rtol=1e-7, atol=1e-10)
    assert scores[1, 3].isnan()


def test_lime_shows_a_coalition_once_however_often_it_is_drawn() -> None:
    assert len(lime_design(4, LimeOptions()).coalitions) == 16
    design = lime_design(30, LimeOptions(samples=200))
    assert len(design.coalitions) == 200
    assert design.coalitions.all(dim=1).sum() == 1


def test_part_means_are_means_over_parts() -> None:
    images, _ = pictures(2)
    parts = quarters(2)
    means = part_means(images, Players.of(parts))
    for b in range(2):
        for label in parts[b].unique():
            inside = parts[b] == label
            expected = images[b][:, inside].mean(1, keepdim=True)
            torch.testing.assert_close(means[b][:, inside], expected.expand(3, int(inside.sum())))


@pytest.mark.parametrize("method", ["kernel_shap", "lime"])
def test_an_image_without_parts_has_no_scores_and_one_part_has_all(method: str) -> None:
    model = tiny_cnn()
    images, targets = pictures(3)
    parts = quarters(3)
    parts[0] = 255
    parts[2] = 0
    options = {"baseline": "black", "scalar": "logit"}
    scores = score_parts(model, images, targets, parts, method=method, options=options).score
    assert scores[0].isnan().all()
    assert scores[2].isnan().tolist() == [False, True, True]
    if method == "kernel_shap":
        black = model.normalise(torch.zeros_like(images[2:]))
        drop = (model(images[2:]) - model(black))[0, targets[2]]
        torch.testing.assert_close(scores[2, 0], drop)
    none = torch.full_like(parts, 255)
    assert score_parts(model, images, targets, none, method=method).score.shape == (3, 0)
    assert attribute(model, images, targets, method=method, parts=none).eq(0).all()


@pytest.mark.parametrize(("method", "pictures_an_image"), [("kernel_shap", (16, 8)), ("lime", (16, 8))])
def test_part_methods_fill_their_passes_with_pairs(method: str, pictures_an_image: tuple[int, int]) -> None:
    """All 2^4 and 2^3 coalitions of two images, in passes of five pictures."""
    model = tiny_vit()
    images, targets = pictures(2)
    held: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _module, inputs: held.append(len(inputs[0])))
    try:
        score_parts(model, images, targets, quarters(2), method=method, batch_size=5)
    finally:
        handle.remove()
    assert held == [5, 5, 5, 5, sum(pictures_an_image) - 20]
    assert methods.get(method).output == "parts"
