"""Rank stability against a slow twin with scipy's Spearman and Python's sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.measuring import chosen
from tests.xai_core.metrics.explaining import Passes, corner, explained, linear, measured, root, undecided
from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.errors import UsageError
from xai_core.metrics import Evidence
from xai_core.metrics import evaluate as measure
from xai_core.metrics.robustness.noise import noise_pictures
from xai_core.metrics.robustness.rank_stability import top_jaccard
from xai_core.models import Classifier

SAMPLES = 4
# So much noise that some copies flip the tiny models' predictions and others do not.
SIGMA = {tiny_vit: 0.12, tiny_cnn: 0.1}


def sixteenths(count: int) -> Tensor:
    """Sixteen square parts; the second image has twelve, and every image has others than its neighbours."""
    along = torch.arange(SIZE) // (SIZE // 4)
    labels = (along.view(-1, 1) * 4 + along).to(torch.uint8).repeat(count, 1, 1)
    labels[1][labels[1] >= 12] = 255
    return torch.stack([one.roll(3 * row, dims=1) for row, one in enumerate(labels)])


def slow_scores(evidence: Evidence, row: int, sigma: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """An image's clean and noisy scores on every copy that is kept, one explanation at a time."""
    model, explainer, parts = evidence.model, evidence.explainer, evidence.labels[row : row + 1]
    assert explainer is not None
    mean, std = (np.array(model.data_config[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    image = evidence.images[row]
    present = ~evidence.scores[row].isnan().numpy()
    found = []
    for sample in range(SAMPLES):
        noise = noise_pictures(0, slice(sample, sample + 1), evidence.images)[0].numpy()
        picture = np.clip(np.clip(image.numpy() * std + mean, 0, 1) + sigma * noise, 0, 1)
        copy = torch.from_numpy((picture - mean) / std)[None]
        if int(model(copy).argmax()) == int(model(image[None]).argmax()):
            noisy = explainer.scores(model, copy, evidence.targets[row : row + 1], parts)[0].numpy()
            found.append((evidence.scores[row].numpy()[present], noisy[: len(present)][present[: len(noisy)]]))
    return found


def slow_jaccard(a: np.ndarray, b: np.ndarray, top: int) -> float:
    first, second = (set(sorted(range(len(one)), key=lambda k, one=one: -one[k])[:top]) for one in (a, b))
    return len(first & second) / len(first | second)


SLOW: tuple[tuple[dict[str, object], Callable[[np.ndarray, np.ndarray], float]], ...] = (
    ({}, lambda a, b: float(scipy.stats.spearmanr(a, b)[0])),
    ({"similarity": "top_jaccard"}, lambda a, b: slow_jaccard(a, b, 3)),
    ({"similarity": "top_jaccard", "top": 5}, lambda a, b: slow_jaccard(a, b, 5)),
)


@pytest.mark.parametrize("method", ["input_x_gradient", "kl_hessian"])
@pytest.mark.parametrize("build", SIGMA, ids=lambda one: one.__name__)
def test_all_similarities_agree_with_a_slow_twin(build: Callable[[], Classifier], method: str) -> None:
    images, targets = pictures(5)
    evidence = explained(undecided(build(), images), images, targets, method, sixteenths(5), batch_size=3)
    kept = [slow_scores(evidence, row, SIGMA[build]) for row in range(5)]
    for more, similarity in SLOW:
        values, reasons = measured(evidence, "rank_stability", samples=SAMPLES, sigma=SIGMA[build], **more)
        for row, scores in enumerate(kept):
            assert (reasons[row] is None) == bool(scores)
            if scores:
                expected = np.mean([similarity(clean, noisy) for clean, noisy in scores])
                assert float(values[row]) == pytest.approx(expected, abs=1e-9)
    assert any(0 < len(scores) < SAMPLES for scores in kept), kept


def test_hardly_any_noise_leaves_the_order() -> None:
    images, targets = pictures(3)
    # Noise is added to what the denormalised image shows, which is cut at 0 and 1.
    images = images.clamp(-1, 1)
    evidence = explained(tiny_vit(), images, targets, "gradient", sixteenths(3))
    for more in ({}, {"similarity": "top_jaccard"}):
        values, _ = measured(evidence, "rank_stability", sigma=1e-7, samples=2, **more)
        torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64))


def test_parts_that_do_not_exist_are_never_among_the_top() -> None:
    """Every part of this image scores below zero; four of sixteen are missing."""
    model = linear()
    evidence = explained(
        model,
        -0.3 * model.module.weight[:2],
        torch.tensor([0, 1]),
        "input_x_gradient",
        sixteenths(2),
    )
    assert float(evidence.scores.nan_to_num(-1).max()) < 0
    values, _ = measured(evidence, "rank_stability", sigma=1e-6, similarity="top_jaccard", top=5)
    assert values.tolist() == [1, 1]


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = tiny_cnn()
    images, targets = pictures(3)
    parts = sixteenths(3)
    together = explained(model, images, targets, "gradient", parts)
    expected, _ = measured(together, "rank_stability", samples=3)
    for row in range(3):
        one = slice(row, row + 1)
        alone = explained(model, images[one], targets[one], "gradient", parts[one], batch_size=1)
        torch.testing.assert_close(measured(alone, "rank_stability", samples=3)[0][0], expected[row])


def test_similarities_share_their_explanations() -> None:
    images, targets = pictures(3)
    evidence = explained(tiny_vit(), images, targets, "gradient", sixteenths(3), batch_size=4)
    passes = Passes(evidence.model)
    wanted = [
        *chosen("rank_stability", samples=2),
        *chosen("rank_stability", samples=2, similarity="top_jaccard"),
        *chosen("rank_stability", samples=2, similarity="top_jaccard", top=4),
    ]
    names = list(measure(evidence, wanted).values)
    assert names == [
        "rank_stability[samples=2]",
        "rank_stability[samples=2,similarity=top_jaccard]",
        "rank_stability[samples=2,similarity=top_jaccard,top=4]",
    ]
    assert sum(passes.sizes) == 3 + 3 * 2 + 3 * 2


def test_why_there_is_no_value() -> None:
    images, targets = pictures(6)
    images[:, 0, 0, 0] = 1.0
    images[5, 0, 0, 0] = -1.999
    parts = quarters(6)
    parts[2] = 0
    # The last image's first value is all but black, where noise lets the root's derivative vanish into NaN.
    evidence = explained(corner(lambda seen: root(seen + 2.0)), images, 0 * targets, "gradient", parts)
    evidence.maps[3] = 0.5
    evidence.maps[4, 4, 5] = torch.nan
    told = (None, None, "fewer than two parts", "all parts score the same", "the map is not finite")
    values, reasons = measured(evidence, "rank_stability", sigma=0.2)
    assert reasons[:5] == told
    assert values.isnan().tolist()[:5] == [False, False, True, True, True]
    assert reasons[5] == "the map of a noisy copy is not finite"
    _, reasons = measured(evidence, "rank_stability", sigma=0.2, similarity="top_jaccard")
    assert reasons[:5] == (None, "no more parts than the top takes", *told[2:])


def test_a_noisy_copy_that_ranks_nothing_leaves_no_value() -> None:
    images, targets = pictures(2)
    images[:, 0, 0, 0] = torch.tensor([0.01, 1.9])
    evidence = explained(corner(torch.relu), images, 0 * targets, "gradient", quarters(1).expand(2, -1, -1))
    for more in ({}, {"similarity": "top_jaccard"}):
        values, reasons = measured(evidence, "rank_stability", **more)
        assert reasons == ("all parts of a noisy copy score the same", None)
        assert float(values[1]) == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 9))
def test_jaccard_of_tops_agrees_with_sets(seed: int, top: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 4, (2, 3, parts + top), generator=generator).double()
    ours = top_jaccard(a, b, top)
    for row in range(3):
        assert float(ours[row]) == pytest.approx(slow_jaccard(a[row].numpy(), b[row].numpy(), top))


def test_options_are_checked() -> None:
    for options, told in (
        ({"sigma": -0.1}, "sigma: expected a standard deviation > 0, got -0.1"),
        ({"top": 0, "similarity": "top_jaccard"}, "top: expected at least 1, got 0"),
        ({"top": 5}, "top: nothing reads it with similarity 'spearman'"),
        ({"similarity": "kendall"}, "similarity: expected one of spearman, top_jaccard, got 'kendall'"),
    ):
        with pytest.raises(UsageError, match=told):
            chosen("rank_stability", **options)
