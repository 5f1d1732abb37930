"""What every metric of a map must hold, whatever it measures."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.measuring import chosen, evaluate
from tests.xai_core.tiny import SIZE, pictures, quarters, tiny_cnn, tiny_vit
from xai_core.metrics import Evaluation, Truth, join_evaluations
from xai_core.metrics.truth import INSIDE
from xai_core.registry import metrics

FAMILIES = ("perturbation", "complexity")
#: What the tiny pictures come with; a metric that needs anything else is tested where that is.
GIVEN = {"parts", "mask"}
#: Budgets that make every test fast, for whichever option of that name a metric has.
SMALL = {"steps": 6, "samples": 8, "thresholds": (0.1, 0.5), "percentages": (20, 60)}
#: Metrics whose definition gives a map of equal, non-zero pixels a value; all others rank pixels or parts.
DEFINED_ON_A_CONSTANT = {"gini", "entropy", "effective_complexity"}
#: Metrics whose definition depends on the map's scale.
SCALE_MATTERS: set[str] = set()

NAMES = [entry.name for entry in metrics if entry.family in FAMILIES]
every_metric = pytest.mark.parametrize("name", NAMES)


def small(*names: str) -> list[Any]:
    """Metrics under small budgets."""
    wanted = []
    for name in names:
        entry = metrics.get(name)
        if missing := set(entry.needs) - GIVEN:
            pytest.skip(f"{name} needs {', '.join(sorted(missing))}, which tiny pictures do not have")
        options = {field.name for field in dataclasses.fields(entry.options)}
        wanted += chosen(name, **{key: value for key, value in SMALL.items() if key in options})
    return wanted


class Pictures:
    """Four pictures with maps, parts and masks, of which any can be measured."""

    def __init__(self, float32: bool = False) -> None:
        self.model = tiny_vit()
        self.images, _ = pictures(4)
        # Predictions that differ between the pictures, as the information curves need them.
        with torch.no_grad():
            self.model.module.head.bias -= self.model(pictures(20)[0]).mean(dim=0)
        self.targets = self.model(self.images).argmax(dim=1)
        if float32:
            self.model.module.float()
            self.images = self.images.float()
        self.maps = torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
        self.parts = quarters(4)
        self.mask = torch.zeros(4, SIZE, SIZE, dtype=torch.uint8)
        self.mask[:, 8:20, 4:16] = INSIDE

    def measure(
        self, *names: str, rows: slice = slice(None), batch_size: int = 64, **changed: Tensor
    ) -> Evaluation:
        held = {key: changed.get(key, getattr(self, key))[rows] for key in ("images", "targets", "maps", "parts")}
        truth = Truth(mask=self.mask[rows])
        return evaluate(self.model, **held, wanted=small(*names), truth=truth, batch_size=batch_size)


@cache
def measured(*names: str, float32: bool = False) -> Evaluation:
    """The four pictures as they are."""
    return Pictures(float32).measure(*names)


def only(result: Evaluation) -> Tensor:
    """The values of the one metric that was measured."""
    (values,) = result.values.values()
    return values


def assert_same(one: Evaluation, other: Evaluation) -> None:
    assert list(one.values) == list(other.values)
    assert list(one.curves) == list(other.curves)
    assert one.reasons == other.reasons
    close = {"rtol": 1e-7, "atol": 1e-9, "equal_nan": True}
    for name, values in one.values.items():
        torch.testing.assert_close(values, other.values[name], **close)
        assert torch.equal(one.broken[name], other.broken[name])
    for name, curve in one.curves.items():
        torch.testing.assert_close(curve.fraction, other.curves[name].fraction, **close)
        torch.testing.assert_close(curve.prob, other.curves[name].prob, **close)


@pytest.mark.parametrize("entry", metrics, ids=lambda entry: entry.name)
def test_every_entry_tells_what_it_is(entry: Any) -> None:
    told = ("summary", "paper", "definition", "undefined", "unit", "cost", "family")
    assert [fact for fact in told if not getattr(entry, fact)] == []
    low, high = entry.bounds
    assert low is None or high is None or low < high


@every_metric
def test_batch_size_changes_nothing(name: str) -> None:
    assert_same(Pictures().measure(name, batch_size=3), measured(name))


@every_metric
@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4), (0, 1, 4)], ids=["one by one", "shards"])
def test_merging_shards_equals_one_pass(name: str, cuts: tuple[int, ...]) -> None:
    four = Pictures()
    shards = [four.measure(name, rows=slice(*ends)) for ends in itertools.pairwise(cuts)]
    assert_same(join_evaluations(shards), measured(name))


@every_metric
def test_what_is_measured_beside_it_changes_nothing(name: str) -> None:
    alone = measured(name)
    among = measured(*[one for one in NAMES if not set(metrics.get(one).needs) - GIVEN])
    (key,) = alone.values
    torch.testing.assert_close(among.values[key], alone.values[key], rtol=0, atol=0, equal_nan=True)
    assert among.reasons[key] == alone.reasons[key]


@every_metric
def test_values_lie_within_the_bounds(name: str) -> None:
    low, high = metrics.get(name).bounds
    four = Pictures()
    for maps in (four.maps, -four.maps, four.images[:, 0].float(), four.mask.float()):
        values = only(result := four.measure(name, maps=maps))
        assert not any(broken.any() for broken in result.broken.values())
        defined = values[~values.isnan()]
        assert len(defined), "nothing was measured"
        assert low is None or bool((defined >= low).all())
        assert high is None or bool((defined <= high).all())


@every_metric
def test_maps_that_say_nothing_have_no_value(name: str) -> None:
    four = Pictures()
    maps = four.maps.clone()
    maps[1, 3, 4] = torch.nan
    maps[2] = 0.0
    maps[3, 5, 6] = torch.inf
    result = four.measure(name, maps=maps)
    (reasons,), (broken,) = result.reasons.values(), result.broken.values()
    assert only(result).isnan().tolist() == [False, True, True, True]
    assert reasons[0] is None and all(reasons[1:])
    assert not broken.any()
    torch.testing.assert_close(only(result)[:1], only(measured(name))[:1], rtol=1e-7, atol=1e-9)
    for curve in result.curves.values():
        assert curve.prob[1:].isnan().all()


@every_metric
def test_constant_maps_have_no_value_where_they_rank_nothing(name: str) -> None:
    four = Pictures()
    result = four.measure(name, maps=torch.full_like(four.maps, 0.3))
    (reasons,) = result.reasons.values()
    defined = name in DEFINED_ON_A_CONSTANT
    assert only(result).isfinite().tolist() == [defined] * 4
    assert [reason is None for reason in reasons] == [defined] * 4


@every_metric
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40], ids=["tiny", "huge"])
def test_a_positive_factor_changes_nothing(name: str, factor: float) -> None:
    four = Pictures()
    scaled = four.measure(name, maps=factor * four.maps)
    same = torch.allclose(only(scaled), only(measured(name)), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert same is (name not in SCALE_MATTERS)


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@every_metric
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.inference_mode, autocast], ids=lambda mode: mode.__name__
)
def test_the_callers_modes_do_not_matter(name: str, mode: Callable[[], Any]) -> None:
    with torch.no_grad():
        usual = measured(name, float32=True)
    four = Pictures(float32=True)
    with mode():
        within = four.measure(name)
    assert_same(within, usual)
    assert not only(within).requires_grad


@every_metric
def test_the_callers_tensors_and_random_numbers_stay_as_they_are(name: str) -> None:
    four = Pictures()
    before = [tensor.clone() for tensor in (four.images, four.maps, four.parts, four.mask, four.targets)]
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    first = four.measure(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    np.random.seed(2)
    second = four.measure(name)
    assert torch.equal(only(first).nan_to_num(), only(second).nan_to_num())
    after = (four.images, four.maps, four.parts, four.mask, four.targets)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("prefix", ["", "p_"], ids=["pixels", "parts"])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    baseline=st.sampled_from(["blur", "black", "mean", "noise"]),
    build=st.sampled_from([tiny_vit, tiny_cnn]),
)
def test_deletion_is_the_reverse_of_insertion_of_the_negative(
    prefix: str, seed: int, baseline: str, build: Callable[[], Any]
) -> None:
    model, (images, targets) = build(), pictures(1)
    # Every value once: ties fall in index order both ways.
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(seed))
    map_ = (order - SIZE * SIZE / 2).view(1, SIZE, SIZE)
    down, up = (
        evaluate(model, images, targets, sign * map_, quarters(1), chosen(f"{prefix}{name}", baseline=baseline))
        for sign, name in ((1, "deletion"), (-1, "insertion"))
    )
    (deleted,), (inserted,) = down.curves.values(), up.curves.values()
    torch.testing.assert_close(deleted.prob, inserted.prob.flip(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(only(down), only(up))


@pytest.mark.skipif("srg" not in metrics, reason="srg is not registered")
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10_000), build=st.sampled_from([tiny_vit, tiny_cnn]))
def test_random_maps_have_srg_near_zero(seed: int, build: Callable[[], Any]) -> None:
    count = 32
    images, targets = pictures(1)
    images, targets = images.expand(count, -1, -1, -1), targets.expand(count)
    maps = torch.randn(count, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    values = only(evaluate(build(), images, targets, maps, quarters(count), small("srg")))
    # Five standard errors: one seed in two million fails by chance.
    assert abs(float(values.mean())) < 5 * float(values.std()) / math.sqrt(count)
