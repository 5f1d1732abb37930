"""Perturbation metrics against slow numpy twins, and the properties every curve has."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.baselines import Baseline, gaussian_blur, make_baseline
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation
from xai_core.metrics.trajectory import rank_parts, rank_pixels, removed_pixels
from xai_core.models import Classifier
from xai_core.parts.labels import mean_inside_parts

STEPS = 10


ALL = [
    *chosen("insertion", "deletion", "aopc", steps=STEPS),
    *chosen("p_insertion", "p_deletion", "p_aopc"),
]


@pytest.fixture(scope="module")
def model() -> Classifier:
    return tiny_vit()


def maps_of(count: int) -> Tensor:
    return torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def probability(model: Classifier, image: np.ndarray, target: int) -> float:
    with torch.no_grad():
        logits = model(torch.from_numpy(image)[None])[0].float().numpy().astype(np.float64)
    exponents = np.exp(logits - logits.max())
    return float(exponents[target] / exponents.sum())


def slow_curve(
    model: Classifier, start: np.ndarray, end: np.ndarray, groups: list[np.ndarray], target: int
) -> list[float]:
    """Replaces one group of pixels after the other, one forward a step."""
    image = start.copy()
    curve = [probability(model, image, target)]
    for group in groups:
        for y, x in group:
            image[:, y, x] = end[:, y, x]
        curve.append(probability(model, image, target))
    return curve


def slow_area(fractions: list[float], curve: list[float]) -> float:
    return sum((fractions[i + 1] - fractions[i]) * (curve[i] + curve[i + 1]) / 2 for i in range(len(curve) - 1))


def pixel_groups(map_: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    pixels = sorted(((-map_[y, x], y * SIZE + x) for y in range(SIZE) for x in range(SIZE)), key=lambda one: one)
    order = [divmod(index, SIZE) for _, index in pixels]
    counts = [math.floor(t * len(order) / STEPS) for t in range(STEPS // 2 + 1)]
    counts += [len(order) - counts[STEPS - t] for t in range(STEPS // 2 + 1, STEPS + 1)]
    groups = [np.array(order[a:b]).reshape(-1, 2) for a, b in itertools.pairwise(counts)]
    return groups, [count / len(order) for count in counts]


def part_groups(labels: np.ndarray, scores: dict[int, float]) -> list[np.ndarray]:
    order = sorted(scores, key=lambda part: (-scores[part], part))
    groups = [np.argwhere(labels == part) for part in order]
    groups[-1] = np.concatenate([groups[-1], np.argwhere(labels == 255)])
    return groups


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_all_six_agree_with_slow_twins(build) -> None:  # type: ignore[no-untyped-def]
    model = build()
    images, targets = pictures(2)
    maps, parts = maps_of(2), quarters(2)
    fast = evaluate(model, images, targets, maps, parts, ALL, batch_size=7)
    for b in range(2):
        image = images[b].numpy()
        blur = make_baseline(Baseline(), model, images[b : b + 1])[0].numpy()
        target = int(targets[b])
        groups, fractions = pixel_groups(maps[b].numpy())
        deletion = slow_curve(model, image, blur, groups, target)
        insertion = slow_curve(model, blur, image, groups, target)
        scores = {
            part: float(maps[b].double()[parts[b] == part].mean())
            for part in parts[b].unique().tolist()
            if part < 255
        }
        wholes = part_groups(parts[b].numpy(), scores)
        shares = [k / len(wholes) for k in range(len(wholes) + 1)]
        part_deletion = slow_curve(model, image, blur, wholes, target)
        expected = {
            f"insertion[steps={STEPS}]": slow_area(fractions, insertion),
            f"deletion[steps={STEPS}]": slow_area(fractions, deletion),
            f"aopc[steps={STEPS}]": float(np.mean([deletion[0] - p for p in deletion[1:]])),
            "p_insertion": slow_area(shares, slow_curve(model, blur, image, wholes, target)),
            "p_deletion": slow_area(shares, part_deletion),
            "p_aopc": float(np.mean([abs(part_deletion[0] - p) for p in part_deletion[1:]])),
        }
        for name, value in expected.items():
            assert float(fast.values[name][b]) == pytest.approx(value, abs=1e-6), name
        np.testing.assert_allclose(fast.curves[f"deletion[steps={STEPS}]"].prob[b], deletion, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.sampled_from(["blur", "black", "mean", "noise"]))
def test_deletion_is_the_reverse_of_insertion_of_the_negative(steps: int, seed: int, baseline: str) -> None:
    model = tiny_vit()
    images, targets = pictures(1)
    map_ = torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    parts = quarters(1)
    deleted = evaluate(model, images, targets, map_, parts, chosen("deletion", steps=steps, baseline=baseline))
    inserted = evaluate(model, images, targets, -map_, parts, chosen("insertion", steps=steps, baseline=baseline))
    (down,), (up,) = deleted.curves.values(), inserted.curves.values()
    torch.testing.assert_close(down.prob, up.prob.flip(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*deleted.values.values(), *inserted.values.values())


@given(st.integers(1, 3000), st.integers(1, 200))
def test_removed_pixels_are_symmetric_and_complete(pixels: int, steps: int) -> None:
    counts = removed_pixels(pixels, steps).tolist()
    assert counts[0] == 0
    assert counts[-1] == pixels
    assert counts == sorted(counts)
    if (steps % 2 == 0 and pixels % 2 == 0) or steps % 2:
        assert all(a + b == pixels for a, b in zip(counts, counts[::-1], strict=True))


def test_a_batch_equals_its_images_one_by_one(model: Classifier) -> None:
    images, targets = pictures(4)
    maps, parts = maps_of(4), quarters(4)
    together = evaluate(model, images, targets, maps, parts, ALL, batch_size=64)
    for b in range(4):
        one = slice(b, b + 1)
        alone = evaluate(model, images[one], targets[one], maps[one], parts[one], ALL, batch_size=1)
        for name, values in together.values.items():
            torch.testing.assert_close(alone.values[name][0], values[b], rtol=1e-6, atol=1e-9)


def test_random_maps_prefer_neither_order(model: Classifier) -> None:
    images, targets = pictures(1)
    count = 64
    images, targets = images.expand(count, -1, -1, -1), targets.expand(count)
    maps, parts = maps_of(count), quarters(1).expand(count, -1, -1)
    most = evaluate(model, images, targets, maps, parts, chosen("deletion", steps=STEPS)).values
    least = evaluate(model, images, targets, -maps, parts, chosen("deletion", steps=STEPS)).values
    gap = next(iter(least.values())) - next(iter(most.values()))
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(count)


def test_constant_and_broken_maps_are_undefined(model: Classifier) -> None:
    images, targets = pictures(3)
    maps, parts = maps_of(3), quarters(3)
    maps[1] = 0.5
    maps[2, 3, 4] = float("nan")
    result = evaluate(model, images, targets, maps, parts, ALL)
    for name, values in result.values.items():
        assert not values[0].isnan(), name
        assert values[1].isnan(), name
        assert values[2].isnan(), name
        assert result.reasons[name][0] is None
        assert result.reasons[name][1] in ("the map is constant", "all parts score the same")
        assert result.reasons[name][2] == "the map is not finite"
    assert result.curves[f"deletion[steps={STEPS}]"].prob[1].isnan().all()


def test_one_part_ranks_nothing(model: Classifier) -> None:
    images, targets = pictures(1)
    result = evaluate(model, images, targets, maps_of(1), torch.zeros(1, SIZE, SIZE), ALL)
    assert result.values["p_deletion"].isnan().all()
    assert not result.values[f"deletion[steps={STEPS}]"].isnan().any()


def test_part_methods_are_ranked_by_their_own_scores(model: Classifier) -> None:
    images, targets = pictures(2)
    parts = quarters(2)
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, float("nan")]])
    by_score = evaluate(model, images, targets, maps_of(2), parts, ALL, part_scores=scores)
    painted = torch.zeros(2, SIZE, SIZE)
    for b in range(2):
        for part in range(4):
            painted[b][parts[b] == part] = scores[b, part]
    by_map = evaluate(model, images, targets, painted, parts, ALL)
    for name in ("p_insertion", "p_deletion", "p_aopc"):
        torch.testing.assert_close(by_score.values[name], by_map.values[name])


class Counted:
    """Counts the images that go through a classifier."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.images = 0
        model.module.register_forward_hook(self._count)

    def _count(self, _module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
        self.images += len(inputs[0])


def test_nothing_is_forwarded_twice() -> None:
    counted = Counted(tiny_vit())
    images, targets = pictures(2)
    evaluate(counted.model, images, targets, maps_of(2), quarters(2), ALL)
    # Clean and baseline once an image; T - 1 inner steps for two pixel curves, K - 1 for two part curves.
    inner_parts = (4 - 1) + (3 - 1)
    assert counted.images == 2 * 2 + 2 * 2 * (STEPS - 1) + 2 * inner_parts


def test_ties_fall_in_index_order() -> None:
    position = rank_pixels(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])).position
    assert position.tolist() == [[[2, 0], [1, 3]]]
    ranking = rank_parts(torch.tensor([[5.0, 5.0, 7.0]]), torch.tensor([[[0, 1], [2, 255]]]))
    assert ranking.position.tolist() == [[[1, 2], [0, 2]]]


def test_baselines(model: Classifier) -> None:
    images, _ = pictures(2)
    black = make_baseline(Baseline("black"), model, images)
    torch.testing.assert_close(model.denormalise(black), torch.zeros_like(images))
    assert float(make_baseline(Baseline("mean"), model, images).abs().max()) == 0
    noise = make_baseline(Baseline("noise", seed=3), model, images)
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.equal(noise, make_baseline(Baseline("noise", seed=4), model, images))


def test_blur_agrees_with_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    images, _ = pictures(1)
    ours = gaussian_blur(images, 2.0)[0].numpy()
    theirs = np.stack([gaussian_filter(channel, 2.0, mode="mirror") for channel in images[0].numpy()])
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_mean_inside_parts() -> None:
    maps, parts = maps_of(2), quarters(2)
    scores = mean_inside_parts(maps, parts)
    for b in range(2):
        for part in range(4):
            inside = maps[b][parts[b] == part]
            if len(inside):
                assert float(scores[b, part]) == pytest.approx(float(inside.double().mean()))
            else:
                assert scores[b, part].isnan()


def test_sizes_and_options_are_checked(model: Classifier) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=r"expected maps of shape \(1, 32, 32\), got \(1, 16, 16\)"):
        evaluate(model, images, targets, torch.zeros(1, 16, 16), quarters(1), ALL)
    with pytest.raises(UsageError, match="steps: expected at least 1, got 0"):
        chosen("deletion", steps=0)
    with pytest.raises(UsageError, match="has no option 'step'"):
        chosen("deletion", step=5)


def test_ids_carry_the_variant(model: Classifier) -> None:
    images, targets = pictures(1)
    wanted = chosen("deletion", baseline="black", steps=5) + chosen("deletion", steps=5)
    result: Evaluation = evaluate(model, images, targets, maps_of(1), quarters(1), wanted)
    assert list(result.values) == ["deletion[baseline=black,steps=5]", "deletion[steps=5]"]
    assert set(result.reasons["deletion[steps=5]"]) == {None}
    assert set(result.curves) == {"deletion[black,steps=5]", "deletion[steps=5]"}
