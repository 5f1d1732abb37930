"""Agreement with true effects, against twins written from the definitions, and what makes it null."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, tiny_cnn
from xai_core.errors import UsageError
from xai_core.metrics import Evaluation, Truth
from xai_core.models import Classifier

BOTH = chosen("true_effect_rank", "true_effect_top1")
NONE = 255


@pytest.fixture(scope="module")
def model() -> Classifier:
    return tiny_cnn()


def strips(*counts: int) -> Tensor:
    """Labels of images that are cut into so many upright strips; the last row belongs to no part."""
    labels = torch.full((len(counts), SIZE, SIZE), NONE, dtype=torch.uint8)
    for image, count in enumerate(counts):
        for part in range(count):
            labels[image, :-1, part * SIZE // count : (part + 1) * SIZE // count] = part
    return labels


def measured(model: Classifier, maps: Tensor, labels: Tensor, effects: Tensor) -> Evaluation:
    images, targets = pictures(len(maps))
    return evaluate(model, images, targets, maps, None, BOTH, truth=Truth(parts=labels, effects=effects))


def painted(scores: list[list[float]], labels: Tensor) -> Tensor:
    """Maps that are a part's score inside it; noise of mean zero along its pixels, and much outside all parts."""
    maps = torch.full(labels.shape, 50.0, dtype=torch.float64)
    for image, of_image in enumerate(scores):
        for part, score in enumerate(of_image):
            inside = labels[image] == part
            noise = torch.linspace(-1, 1, int(inside.sum()), dtype=torch.float64)
            maps[image][inside] = score + noise
    return maps


def table(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[torch.nan] * (width - len(row))] for row in rows], dtype=torch.float64)


def rank_twin(map_: np.ndarray, labels: np.ndarray, effects: np.ndarray) -> float:
    seen = [part for part in range(len(effects)) if (labels == part).any()]
    scores = [map_[labels == part].mean() for part in seen]
    return float(scipy.stats.spearmanr(scores, effects[seen]).statistic)


def top1_twin(map_: np.ndarray, labels: np.ndarray, effects: np.ndarray) -> float:
    seen = [part for part in range(len(effects)) if (labels == part).any()]
    scores = {part: map_[labels == part].mean() for part in seen}
    best = [part for part in seen if scores[part] == max(scores.values())]
    strongest = [part for part in seen if effects[part] == max(effects[one] for one in seen)]
    return len(set(best) & set(strongest)) / len(best)


def test_both_follow_their_definitions(model: Classifier) -> None:
    labels = strips(5, 4, 3)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    effects = table([[3.0, 1.0, -2.0, 1.0, 0.5], [0.1, 0.2, 0.3, -0.1], [1.0, 2.0, 3.0]])
    found = measured(model, maps, labels, effects)
    for image in range(3):
        of_image = maps[image].numpy(), labels[image].numpy(), effects[image][: (5, 4, 3)[image]].numpy()
        assert found.values["true_effect_rank"][image] == pytest.approx(rank_twin(*of_image), abs=1e-12)
        assert found.values["true_effect_top1"][image] == top1_twin(*of_image)


def test_known_values(model: Classifier) -> None:
    labels = strips(4, 4, 4)
    maps = painted([[1, 2, 3, 4], [4, 3, 2, 1], [-4, -3, -2, -8]], labels)
    found = measured(model, maps, labels, table([[0.1, 0.2, 0.3, 9.0]] * 3))
    # The order of the third is 1, 2, 3, 0 against 0, 1, 2, 3: 1 - 6 (1 + 1 + 1 + 9) / (4 * 15).
    assert found.values["true_effect_rank"].tolist() == pytest.approx([1, -1, -0.2])
    assert found.values["true_effect_top1"].tolist() == [1, 0, 0]


def test_a_part_that_is_not_seen_does_not_count(model: Classifier) -> None:
    """Its score would be made up: here it would turn the best order into a middling one."""
    labels = strips(4)
    labels[labels == 1] = NONE
    found = measured(model, painted([[1, 2, 3, 4]], labels), labels, table([[1.0, 99.0, 2.0, 3.0]]))
    assert found.values["true_effect_rank"].item() == pytest.approx(1)
    assert found.values["true_effect_top1"].item() == 1


def test_parts_that_share_the_highest_score_share_the_hit(model: Classifier) -> None:
    labels = strips(4)
    maps = torch.zeros(1, SIZE, SIZE)
    maps[labels <= 1] = 1.0
    for effects, share in [([5.0, 1.0, 1.0, 1.0], 0.5), ([5.0, 5.0, 1.0, 1.0], 1.0), ([1.0, 1.0, 5.0, 1.0], 0.0)]:
        assert measured(model, maps, labels, table([effects])).values["true_effect_top1"].item() == share


def test_what_means_nothing_is_null_with_its_reason(model: Classifier) -> None:
    labels = strips(4, 4, 4, 4, 2, 1, 4)
    maps = painted([[1, 2, 3, 4]] * 4 + [[1, 2], [1], [1, 2, 3, 4]], labels)
    maps[0] = 0.3
    maps[1, 5, 5] = torch.nan
    maps[2][labels[2] != NONE] = 0.25
    effects = table([[1.0, 2, 3, 4]] * 3 + [[0.5] * 4, [1.0, 2], [1.0], [1.0, 2, 3, 4]])
    found = measured(model, maps, labels, effects)
    common = [
        "the map is constant",
        "the map is not finite",
        "all true parts score the same",
        "all true effects are equal",
    ]
    assert found.reasons["true_effect_rank"] == (*common, *["fewer than three true parts are seen"] * 2, None)
    assert found.reasons["true_effect_top1"] == (*common, None, "fewer than two true parts are seen", None)
    for name, reasons in found.reasons.items():
        assert found.values[name].isnan().tolist() == [reason is not None for reason in reasons]
        assert not found.broken[name].any()


def test_pictures_without_any_known_part_are_null(model: Classifier) -> None:
    labels = torch.full((2, SIZE, SIZE), NONE, dtype=torch.uint8)
    maps = torch.randn(2, SIZE, SIZE)
    for effects in (torch.zeros(2, 0), torch.full((2, 3), torch.nan)):
        found = measured(model, maps, labels, effects)
        assert found.reasons["true_effect_rank"] == ("fewer than three true parts are seen",) * 2


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=3, max_size=7),
    st.lists(st.floats(-5, 5, allow_nan=False).map(lambda one: round(one, 1)), min_size=7, max_size=7),
    st.floats(0.1, 9),
)
def test_only_the_order_of_the_scores_counts(scores: list[int], effects: list[float], factor: float) -> None:
    model = tiny_cnn()
    labels = strips(len(scores)).expand(2, -1, -1).clone()
    scaled = [[float(one) for one in scores], [factor * one**3 + 7 for one in scores]]
    known = table([effects[: len(scores)]] * 2)
    found = measured(model, flat(scaled, labels), labels, known)
    for name in found.values:
        one, other = found.values[name].tolist()
        assert other == pytest.approx(one, nan_ok=True, abs=1e-12)
        low, high = {"true_effect_rank": (-1, 1), "true_effect_top1": (0, 1)}[name]
        assert one != one or low <= one <= high
    turned = measured(model, -flat(scaled, labels), labels, known).values["true_effect_rank"]
    expected = (-found.values["true_effect_rank"]).tolist()
    assert turned.tolist() == pytest.approx(expected, nan_ok=True)


def flat(scores: list[list[float]], labels: Tensor) -> Tensor:
    """Maps that are exactly a part's score inside it."""
    maps = torch.full(labels.shape, 0.5, dtype=torch.float32)
    for image, of_image in enumerate(scores):
        for part, score in enumerate(of_image):
            maps[image][labels[image] == part] = score
    return maps


def test_one_by_one_is_the_same_as_all_together(model: Classifier) -> None:
    labels = strips(5, 3, 2)
    maps = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    effects = table([[3.0, 1.0, -2.0, 1.5, 0.5], [0.1, 0.2, 0.3], [1.0, 2.0]])
    together = measured(model, maps, labels, effects)
    for image in range(3):
        rows = slice(image, image + 1)
        alone = measured(model, maps[rows], labels[rows], effects[rows])
        for name in together.values:
            assert torch.equal(alone.values[name], together.values[name][rows]) or alone.values[name].isnan()
            assert alone.reasons[name] == together.reasons[name][rows]


def test_without_effects_it_is_refused(model: Classifier) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="metric 'true_effect_rank' needs true effects of parts"):
        evaluate(model, images, targets, torch.randn(1, SIZE, SIZE), None, BOTH[:1])


def test_funny_birds_single_deletion_differs_in_three_ways(model: Classifier) -> None:
    """It sums over masks grown by two pixels where we take means, and moves the correlation to [0, 1].

    A large part that matters little and a small one that matters much: the sum ranks them by their size.
    """
    labels = torch.full((1, SIZE, SIZE), NONE, dtype=torch.uint8)
    labels[0, :20, :20], labels[0, 22:24, 22:24], labels[0, 26:31, :5] = 0, 1, 2
    maps = flat([[0.2, 1.0, 0.1]], labels)
    maps[labels == NONE] = 0
    effects = table([[1.0, 5.0, 0.5]])
    found = measured(model, maps, labels, effects).values["true_effect_rank"].item()
    sums = [float((maps[0].numpy() * maximum_filter(labels[0].numpy() == part, 5)).sum()) for part in range(3)]
    published = 0.5 + 0.5 * scipy.stats.spearmanr(sums, effects[0]).statistic
    assert found == pytest.approx(1.0)
    assert published == pytest.approx(0.75)
