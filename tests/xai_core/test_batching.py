"""Batches that do not fit: real refusals by the allocator, halved until they fit, with the results unchanged."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from tests.memory import MIB, Meal, memory_left, needs_limits, short_of_memory
from tests.xai_core.measuring import evaluate
from tests.xai_core.tiny import pictures, quarters, tiny_cnn, tiny_vit
from xai_core.attribution import PartScores, attribute, join_scores, score_parts
from xai_core.batching import Batches, is_out_of_memory, join_rows, run_batches, run_smaller, try_batches
from xai_core.concepts import sample_pfvs
from xai_core.errors import NotFinite, OutOfMemory
from xai_core.metrics import join_evaluations
from xai_core.parts import parse_parts
from xai_core.registry import build_options, metrics

pytestmark = [needs_limits, short_of_memory]


def positions(rows: slice) -> list[int]:
    return list(range(rows.start, rows.stop))


def test_what_fits_is_run_as_it_comes() -> None:
    assert run_batches(positions, 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert run_batches(positions, 0, 3) == []
    assert try_batches(positions, 4, 9) == Batches([[0, 1, 2, 3]], [0, 1, 2, 3], {})


def test_only_the_batch_that_does_not_fit_is_halved_and_order_is_kept() -> None:
    asked = []
    meal = Meal(fits=2)

    def function(rows: slice) -> list[int]:
        asked.append((rows.start, rows.stop))
        if 8 in positions(rows):
            meal.take(rows.stop - rows.start)
        return positions(rows)

    assert run_batches(function, 16, 6) == [[0, 1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11], [12, 13, 14, 15]]
    assert meal.refused == [6, 3]
    assert asked == [(0, 6), (6, 12), (6, 9), (6, 8), (8, 9), (9, 12), (12, 16)]


def test_a_row_that_does_not_fit_alone_is_named_and_the_others_are_treated() -> None:
    def function(rows: slice) -> list[int]:
        if 5 in positions(rows):
            Meal(fits=0).take(1)
        return positions(rows)

    found = try_batches(function, 8, 4)
    assert found.rows == [0, 1, 2, 3, 4, 6, 7]
    assert [one for result in found.results for one in result] == found.rows
    assert list(found.failed) == [5]
    assert isinstance(found.failed[5], OutOfMemory)
    assert "does not fit in memory even alone" in str(found.failed[5])
    assert f"{64 * MIB} bytes" in str(found.failed[5])
    with pytest.raises(OutOfMemory, match="even alone"):
        run_batches(function, 8, 4)


def test_an_image_of_its_own_trouble_is_found_the_same_way() -> None:
    def function(rows: slice) -> list[int]:
        if 3 in positions(rows):
            raise NotFinite("three")
        return positions(rows)

    found = try_batches(function, 6, 6)
    assert found.rows == [0, 1, 2, 4, 5]
    assert repr(found.failed) == repr({3: NotFinite("three")})


def test_any_other_error_goes_on_its_way() -> None:
    def function(rows: slice) -> None:
        raise RuntimeError("a size of a tensor must match")

    with pytest.raises(RuntimeError, match="must match"):
        try_batches(function, 4, 2)


def test_numpy_says_it_too() -> None:
    def function(rows: slice) -> int:
        with memory_left(96 * MIB):
            return len(np.zeros((rows.stop - rows.start) * 64 * MIB, np.uint8)) // (64 * MIB)

    assert run_batches(function, 4, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution forward primitive"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, found: bool) -> None:
    assert is_out_of_memory(error) is found


def test_a_refused_batch_is_let_go_before_the_next_try() -> None:
    gc.disable()
    try:
        held: list[weakref.ref] = []
        alive: list[bool] = []

        def function(rows: slice) -> int:
            alive.extend(one() is not None for one in held)
            graph = torch.ones(3, requires_grad=True) * 2
            held.append(weakref.ref(graph))
            Meal(fits=1).take(rows.stop - rows.start)
            return rows.start

        assert run_batches(function, 2, 2) == [0, 1]
        assert len(held) == 3 and alive and not any(alive)
    finally:
        gc.enable()


def test_what_led_to_a_pass_that_does_not_fit_alone_is_let_go_too() -> None:
    gc.disable()
    try:
        held: list[weakref.ref] = []
        alive: list[bool] = []

        def outer(rows: slice) -> int:
            alive.extend(one() is not None for one in held)
            graph = torch.ones(3, requires_grad=True) * 2
            held.append(weakref.ref(graph))
            run_batches(lambda _: Meal(fits=1).take(rows.stop - rows.start), 1, 1)
            return rows.start

        assert run_batches(outer, 2, 2) == [0, 1]
        assert len(held) == 3 and not any(alive)
    finally:
        gc.enable()


def test_passes_of_somebody_elses_loop_shrink_until_they_fit() -> None:
    meal = Meal(fits=3)
    assert run_smaller(lambda size: meal.take(size) or size, 16) == 2
    assert meal.asked == [16, 8, 4, 2]
    with pytest.raises(OutOfMemory):
        run_smaller(meal.take, 16, least=5)
    assert meal.asked[4:] == [16, 8, 5]


def hungry(model, fits: int) -> Meal:
    """Makes every pass of a model ask for memory in proportion to its images."""
    meal = Meal(fits)
    features = model.module.forward_features

    def forward_features(images, *rest, **named):
        meal.take(len(images))
        return features(images, *rest, **named)

    model.module.forward_features = forward_features
    return meal


@pytest.mark.parametrize("family", [tiny_vit, tiny_cnn])
@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients"])
def test_maps_are_those_of_whole_batches(family, method: str) -> None:
    images, targets = pictures(5)
    model = family()
    options = {} if method == "grad_cam" else {"steps": 7}
    whole = attribute(model, images, targets, method=method, options=options, batch_size=5)
    meal = hungry(model, fits=2)
    found = attribute(model, images, targets, method=method, options=options, batch_size=5)
    assert meal.refused and max(set(meal.asked) - set(meal.refused)) <= 2
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hessian", ["finite_difference", "exact"])
def test_part_scores_are_those_of_whole_passes(hessian: str) -> None:
    images, targets = pictures(3)
    model = tiny_vit()
    whole = score_parts(model, images, targets, quarters(3), options={"hessian": hessian}, batch_size=16)
    meal = hungry(model, fits=2)
    found = score_parts(model, images, targets, quarters(3), options={"hessian": hessian}, batch_size=16)
    # Pairs of images and parts were cut, not the three images alone.
    assert max(meal.refused) > 3
    torch.testing.assert_close(found.score, whole.score, rtol=1e-6, atol=1e-12, equal_nan=True)
    for name in ("kl_sym", "curvature"):
        torch.testing.assert_close(found.terms[name], whole.terms[name], rtol=1e-6, atol=1e-9, equal_nan=True)


def test_part_scores_of_batches_join_to_those_of_one() -> None:
    images, targets = pictures(3)
    labels = quarters(3)
    labels[0] = (labels[0] == 3).to(labels.dtype)
    model = tiny_vit()
    whole = score_parts(model, images, targets, labels)
    apart = [score_parts(model, images[i : i + 1], targets[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert [one.score.shape[1] for one in apart] == [2, 3, 4]
    joined = join_scores(apart)
    torch.testing.assert_close(joined.score, whole.score, rtol=1e-6, atol=1e-12, equal_nan=True)
    assert joined.terms.keys() == whole.terms.keys()
    assert join_scores([PartScores(torch.ones(1, 2))]).terms == {}


def chosen() -> list:
    given = {"insertion": {"steps": 4}, "deletion": {"steps": 4}, "p_deletion": {}, "p_aopc": {}}
    return [(metrics.get(name), build_options(metrics.get(name), options)) for name, options in given.items()]


def assert_same_evaluation(found, whole) -> None:
    for kind in ("values", "broken"):
        assert getattr(found, kind).keys() == getattr(whole, kind).keys()
        for name, expected in getattr(whole, kind).items():
            torch.testing.assert_close(getattr(found, kind)[name], expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    for name, curve in whole.curves.items():
        torch.testing.assert_close(found.curves[name].fraction, curve.fraction, equal_nan=True)
        torch.testing.assert_close(found.curves[name].prob, curve.prob, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_metrics_are_those_of_whole_passes() -> None:
    images, targets = pictures(3)
    maps = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tiny_vit()
    whole = evaluate(model, images, targets, maps, quarters(3), chosen(), batch_size=8)
    meal = hungry(model, fits=2)
    found = evaluate(model, images, targets, maps, quarters(3), chosen(), batch_size=8)
    assert 8 in meal.refused
    assert_same_evaluation(found, whole)


def test_evaluations_of_batches_join_to_those_of_one() -> None:
    images, targets = pictures(3)
    maps = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps[2] = 1.0
    model = tiny_vit()
    labels = quarters(3)
    whole = evaluate(model, images, targets, maps, labels, chosen())
    apart = [
        evaluate(model, images[rows], targets[rows], maps[rows], labels[rows], chosen())
        for rows in (slice(1, 2), slice(0, 1), slice(2, 3))
    ]
    joined = join_evaluations([apart[1], apart[0], apart[2]])
    assert_same_evaluation(joined, whole)


def test_parts_and_their_features_are_those_of_whole_batches() -> None:
    images, _ = pictures(4)
    model = tiny_vit()
    whole = parse_parts(model, images, k=3)
    meal = hungry(model, fits=1)
    assert torch.equal(parse_parts(model, images, k=3), whole)
    assert 4 in meal.refused


def test_sampled_vectors_are_those_of_whole_batches() -> None:
    images, targets = pictures(4)
    model = tiny_vit()

    def sample(rows: slice):
        return sample_pfvs(model, images[rows], targets[rows], ["blocks.0"], seeds=[7, 8, 9, 10][rows])["blocks.0"]

    whole = sample(slice(0, 4))
    meal = hungry(model, fits=1)
    found = run_batches(sample, 4, 4)
    assert 4 in meal.refused
    assert torch.equal(torch.cat([one.positions for one in found]), whole.positions)
    torch.testing.assert_close(torch.cat([one.vectors for one in found]), whole.vectors)


def test_narrower_tables_are_filled_up_with_nan() -> None:
    joined = join_rows([torch.ones(1, 1), torch.zeros(2, 3), torch.ones(1, 0)])
    assert joined.shape == (4, 3)
    assert joined.isnan().tolist() == [[False, True, True], [False] * 3, [False] * 3, [True] * 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_that_a_gpu_refuses_is_halved_and_its_memory_given_back() -> None:
    _, total = torch.cuda.mem_get_info()
    each = 256 * MIB

    def allocate(rows: slice) -> int:
        return torch.empty((rows.stop - rows.start) * each, dtype=torch.uint8, device="cuda").numel()

    torch.cuda.set_per_process_memory_fraction(3.5 * each / total)
    try:
        assert run_batches(allocate, 8, 8) == [2 * each] * 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
