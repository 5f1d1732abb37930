"""VAR against a slow twin written from its formulas, and what its definition promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_arrays, attribute_classes, fit_method
from xai_core.attribution.class_sets import by_probability, with_targets
from xai_core.attribution.var import MAPS_PER_PICTURE, VarOptions, class_shares, refined
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.precision import Precision
from xai_core.registry import MethodEntry, build_options, methods, variant_id

MODELS = {"vit": tiny_vit, "cnn": tiny_cnn}
CLASS_SETS: list[dict[str, Any]] = [
    {"classes": "given", "given": (1, 3, 4)},
    {"classes": "top_k+lowest", "k": 2},
    {"classes": "best_worst"},
]
BASES = {"vit": {"name": "grad_cam"}, "cnn": {"name": "grad_cam", "layer": "layer2"}}
FACTORS = (1.0, 5.0, 100.0)


def id_of(**options: Any) -> str:
    return variant_id("var", build_options(methods.get("var"), options))


def slow_classes(model: Classifier, image: Tensor, target: int, options: dict[str, Any]) -> list[int]:
    """The class set of one image: the definition, and the target first."""
    logits = model(image.unsqueeze(0))[0].tolist()
    ranked = sorted(range(CLASSES), key=lambda one: -logits[one])
    chosen = {
        "given": list(options.get("given", ())),
        "top_k+lowest": [*ranked[: options.get("k", 0)], ranked[-1]],
        "best_worst": [ranked[0], ranked[-1]],
    }[options["classes"]]
    return [target, *[one for one in chosen if one != target]]


def slow_shares(maps: list[list[list[float]]]) -> list[list[list[float]]]:
    """Equation 2 pixel by pixel: maps over their joint largest magnitude, softmax, mean over factors."""
    largest = max(abs(value) for one in maps for line in one for value in line) or 1.0
    shares = [[[0.0 for _ in line] for line in one] for one in maps]
    for y in range(len(maps[0])):
        for x in range(len(maps[0][0])):
            for factor in FACTORS:
                powers = [math.exp(factor * one[y][x] / largest) for one in maps]
                for k, power in enumerate(powers):
                    shares[k][y][x] += power / sum(powers) / len(FACTORS)
    return shares


def base_map(model: Classifier, image: Tensor, one: int, of: dict[str, Any]) -> Tensor:
    """Grad-CAM of one class at input resolution, in float64 throughout."""
    entry = methods.get(of["name"])
    options = build_options(entry, {key: value for key, value in of.items() if key != "name"})
    native = entry.function(model, image.unsqueeze(0), torch.tensor([[one]]), options, 1)
    return F.interpolate(native, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]


def slow_var(
    model: Classifier, image: Tensor, target: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, list[int]]:
    """The map, the shares and the classes of one image; every class's map from a call of its own."""
    classes = slow_classes(model, image, target, options)
    maps = [base_map(model, image, one, BASES[model.family]).tolist() for one in classes]
    shares = slow_shares(maps)
    found = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for y in range(SIZE):
        for x in range(SIZE):
            share = shares[0][y][x]
            if share - 1.0 / len(classes) > 1e-12:
                found[y, x] = maps[0][y][x] * share
    return found, torch.tensor(shares, dtype=torch.float64), classes


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("options", CLASS_SETS, ids=lambda one: one["classes"])
def test_agrees_with_the_formula(family: str, options: dict[str, Any]) -> None:
    model = MODELS[family]()
    images, targets = pictures(3)
    chosen = {**options, "of": BASES[family], "keep_distributions": True}
    maps, arrays = attribute_arrays(model, images, targets, method="var", options=chosen)
    for b in range(3):
        expected, shares, classes = slow_var(model, images[b], int(targets[b]), options)
        assert arrays["classes"][b].tolist()[: len(classes)] == classes
        assert set(arrays["classes"][b].tolist()[len(classes) :]) <= {-1}
        # The interface returns float32.
        torch.testing.assert_close(maps[b].double(), expected, rtol=1e-6, atol=1e-30)
        kept = arrays["distributions"][b]
        torch.testing.assert_close(kept[: len(classes)].double(), shares, rtol=0, atol=1e-3)
        assert float(kept[len(classes) :].abs().sum()) == 0
    assert 0.1 < float((maps != 0).double().mean()) < 0.9


def test_shares_agree_with_the_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    maps = 7.0 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    members = torch.tensor([[True, True, True, True], [True, False, True, True]])
    shares = class_shares(maps, members, FACTORS)
    own = torch.tensor([2, 3])
    found = refined(maps, shares, own, members)
    for b in range(2):
        taking_part = members[b].nonzero().flatten().tolist()
        expected = torch.tensor(slow_shares(maps[b, taking_part].tolist()), dtype=torch.float64)
        torch.testing.assert_close(shares[b, taking_part], expected, rtol=1e-9, atol=1e-15)
        share = expected[taking_part.index(int(own[b]))]
        wanted = maps[b, own[b]] * share * (share > 1.0 / len(taking_part))
        torch.testing.assert_close(found[b], wanted, rtol=1e-9, atol=1e-15)
    assert float(shares[1, 1].abs().max()) == 0
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", range(2, 12))
def test_equal_maps_are_a_tie_and_leave_nothing(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    one = torch.randn(1, 1, 16, 16, generator=generator, dtype=dtype)
    members = torch.ones(1, count, dtype=torch.bool)
    maps = one.expand(-1, count, -1, -1)
    for factors in (FACTORS, (1.0,), (0.3, 7.0, 31.0, 900.0, 2.0)):
        shares = class_shares(maps, members, factors)
        torch.testing.assert_close(shares, torch.full_like(shares, 1.0 / count))
        assert float(refined(maps, shares, torch.tensor([0]), members).abs().max()) == 0


def test_the_least_dominance_counts() -> None:
    maps = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    maps[0, 0] += 1e-9
    members = torch.ones(1, 2, dtype=torch.bool)
    shares = class_shares(maps, members, FACTORS)
    assert float(refined(maps, shares, torch.tensor([0]), members)) == pytest.approx(0.5, abs=1e-6)
    assert float(refined(maps, shares, torch.tensor([1]), members)) == 0


@pytest.mark.parametrize("factor", [0.25, 3.7, 1e6])
def test_scaling_all_maps_scales_the_result(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 9, 9, generator=generator, dtype=torch.float64)
    members = torch.ones(2, 5, dtype=torch.bool)
    own = torch.tensor([0, 4])
    once = refined(maps, class_shares(maps, members, FACTORS), own, members)
    scaled = refined(factor * maps, class_shares(factor * maps, members, FACTORS), own, members)
    torch.testing.assert_close(scaled, factor * once, rtol=1e-9, atol=0)


def test_a_class_is_kept_only_where_it_dominates() -> None:
    """Four classes, each with a quarter of its own: each keeps its quarter, at nearly full strength."""
    labels = quarters(1)[0]
    maps = torch.stack([(labels == part).double() for part in range(4)]).unsqueeze(0)
    members = torch.ones(1, 4, dtype=torch.bool)
    shares = class_shares(maps, members, FACTORS)
    for part in range(4):
        found = refined(maps, shares, torch.tensor([part]), members)[0]
        assert bool(((found > 0) == (labels == part)).all())
    with_sign = maps - 0.25
    shares = class_shares(with_sign, members, FACTORS)
    assert float(refined(with_sign, shares, torch.tensor([0]), members)[0].min()) == 0


def test_what_is_not_a_number_stays_so() -> None:
    """A NaN compared with 1/K is no dominance, and must not become a 0 that looks like one."""
    members = torch.ones(2, 3, dtype=torch.bool)
    for bad in (torch.nan, torch.inf):
        maps = torch.rand(2, 3, 4, 4)
        maps[0, 1, 2, 2] = bad
        found = refined(maps, class_shares(maps, members, FACTORS), torch.tensor([0, 0]), members)
        assert bool(found[0].isnan().any())
        assert bool(found[1].isfinite().all())


def test_class_sets_are_those_of_the_appendix() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert by_probability(logits, 2).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert by_probability(logits, 1).tolist() == [[1, 3], [0, 4]]
    for k in (4, 5, 50):
        assert by_probability(logits, k).tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4]]


def test_targets_join_a_set_that_they_are_not_in() -> None:
    contest = with_targets(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 7], [8, 8]]))
    assert contest.classes.gather(1, contest.own).tolist() == [[2, 7], [8, 8]]
    for b, t, expected in [(0, 0, {1, 2}), (0, 1, {1, 2, 7}), (1, 0, {3, 4, 8}), (1, 1, {3, 4, 8})]:
        members = contest.classes[b][contest.members[b, t]].tolist()
        assert set(members) == expected
        assert len(members) == len(expected)
    assert with_targets(torch.tensor([[1, 2]]), torch.tensor([[2, 1]])).classes.tolist() == [[1, 2]]


@contextmanager
def counted(method: str) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the class indices that a method's function is called with, while it does its work."""
    calls: list[tuple[int, int]] = []
    entry = methods.get(method)
    function = entry.function

    def counting(model: Classifier, images: Tensor, classes: Tensor, *others: Any) -> Tensor:
        calls.append((classes.shape[0], classes.shape[1]))
        return function(model, images, classes, *others)

    object.__setattr__(entry, "function", counting)
    try:
        yield calls
    finally:
        object.__setattr__(entry, "function", function)


def test_the_class_maps_come_from_one_call() -> None:
    images, _ = pictures(3)
    model = tiny_cnn()
    top1 = model(images).argmax(dim=1)
    with counted("grad_cam") as calls:
        attribute(model, images, top1, method="var", options={"k": 3})
    assert calls == [(3, 4)]
    with counted("grad_cam") as calls:
        attribute_classes(model, images, torch.tensor([[0, 4]] * 3), method="var", options=CLASS_SETS[0])
    assert calls == [(3, 4)]


def test_many_classes_are_treated_in_smaller_groups_to_the_same_result() -> None:
    images, targets = pictures(5)
    model = tiny_vit()
    given = {"classes": "given", "given": (0, 1, 2, 3, 4), "keep_distributions": True}
    expected, arrays = attribute_arrays(model, images, targets, method="var", options=given)
    with counted("grad_cam") as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr("xai_core.attribution.var.MAPS_PER_PICTURE", 2)
        found, again = attribute_arrays(model, images, targets, method="var", options=given, batch_size=5)
    assert calls == [(2, 5), (2, 5), (1, 5)]
    assert MAPS_PER_PICTURE * 1 >= 11, "K = 10 and the target share the passes of a whole batch"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again["distributions"], arrays["distributions"])


@pytest.mark.parametrize("options", CLASS_SETS, ids=lambda one: one["classes"])
def test_several_targets_are_as_one_by_one(options: dict[str, Any]) -> None:
    model = tiny_vit()
    images, _ = pictures(3)
    classes = torch.tensor([[0, 1, 2], [3, 4, 4], [2, 0, 1]])
    together = attribute_classes(model, images, classes, method="var", options=options)
    for position in range(3):
        alone = attribute(model, images, classes[:, position], method="var", options=options)
        torch.testing.assert_close(together[:, position], alone)


def test_keeping_the_distributions_changes_neither_map_nor_id() -> None:
    model = tiny_cnn()
    images, targets = pictures(2)
    plain, nothing = attribute_arrays(model, images, targets, method="var")
    kept, arrays = attribute_arrays(model, images, targets, method="var", options={"keep_distributions": True})
    assert torch.equal(plain, kept)
    assert torch.equal(attribute(model, images, targets, method="var", options={"keep_distributions": True}), kept)
    assert id_of(keep_distributions=True) == id_of()
    assert nothing == {}
    dimensions = methods.get("var").arrays(VarOptions(keep_distributions=True))
    assert {name: values.ndim - 1 for name, values in arrays.items()} == {
        name: len(one) for name, one in dimensions.items()
    }
    base = attribute(model, images, targets, method="grad_cam")
    torch.testing.assert_close(arrays["base"], base)
    share = arrays["distributions"][:, 0].float()
    torch.testing.assert_close(kept[kept != 0], (base * share)[kept != 0], rtol=2e-3, atol=0)
    assert arrays["distributions"].dtype == torch.float16
    torch.testing.assert_close(
        arrays["distributions"].float().sum(dim=1), torch.ones(2, SIZE, SIZE), atol=3e-3, rtol=0
    )


def test_the_id_always_names_method_and_class_set() -> None:
    assert id_of() == "var[of=grad_cam,classes=top_k+lowest,k=5]"
    assert id_of(of="grad_cam", k=7) == "var[of=grad_cam,classes=top_k+lowest,k=7]"
    steps = {"name": "integrated_gradients", "steps": 20}
    assert id_of(of=steps, classes="best_worst") == "var[of=integrated_gradients[steps=20],classes=best_worst]"
    given = {"classes": "given", "inverse_temperatures": (1.0, 2.0)}
    expected = "var[of=grad_cam,classes=given,given=3+7,inverse_temperatures=1.0+2.0]"
    assert id_of(given=(7, 3, 7), **given) == id_of(given=(3, 7), **given) == expected
    assert id_of(of={"name": "grad_cam", "layer": None}) == id_of()


def test_options_that_are_written_out_read_back_as_themselves() -> None:
    options = VarOptions(of={"name": "integrated_gradients", "steps": 20}, classes="given", given=(2, 1))
    assert VarOptions(**asdict(options)) == options
    assert hash(options) == hash(VarOptions(**asdict(options)))
    assert options.base()[1].steps == 20


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"of": "grad_cm"}, "unknown method 'grad_cm'"),
    ({"of": {"steps": 3}}, r"var\.of: expected a method's name, or a mapping with 'name'"),
    ({"of": {"name": "integrated_gradients", "stps": 3}}, "no option 'stps'"),
    ({"of": {"name": "integrated_gradients", "steps": 0}}, r"integrated_gradients\.steps: expected at least 1"),
    ({"classes": "all"}, r"var\.classes: expected given, top_k\+lowest or best_worst, got 'all'"),
    ({"k": 0}, r"var\.k: expected at least 1, got 0"),
    ({"k": 3, "classes": "best_worst"}, r"var\.k: expected with classes top_k\+lowest only"),
    ({"classes": "given"}, r"var\.given: expected two or more class indices, got \[\]"),
    ({"classes": "given", "given": (2, 2)}, r"var\.given: expected two or more class indices, got \[2\]"),
    ({"classes": "given", "given": (-1, 2)}, r"var\.given: expected two or more class indices"),
    ({"given": (1, 2)}, r"var\.given: expected with classes given only"),
    ({"inverse_temperatures": ()}, r"var\.inverse_temperatures: expected positive finite numbers"),
    ({"inverse_temperatures": (1.0, 0.0)}, r"var\.inverse_temperatures: expected positive finite numbers"),
    ({"of": "kl_hessian"}, "'of' names 'kl_hessian', which scores parts"),
    ({"of": "var"}, "'of' names 'var', which contrasts classes already"),
    (
        {"classes": "given", "given": (1, CLASSES)},
        rf"'given' lists class {CLASSES}, and the model's are 0..{CLASSES - 1}",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_contrasted_is_refused(options: dict[str, Any], message: str) -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match=message):
        attribute(tiny_vit(), images, targets, method="var", options=options)


@contextmanager
def registered(name: str, **facts: Any) -> Iterator[MethodEntry]:
    """A method for the length of a test: it gives the ones of the image's size."""

    @methods.register(name, **facts)
    def ones(model: Classifier, images: Tensor, classes: Tensor, options: Any, batch_size: int) -> Tensor:
        """Ones."""
        return images.new_ones(len(images), classes.shape[1], *images.shape[-2:])

    try:
        yield methods.get(name)
    finally:
        del methods._entries[name]


def test_what_the_wrapped_method_needs_is_asked_of_it() -> None:
    def never(model: Classifier, options: Any) -> str | None:
        """A model that there is not."""
        return "no model has it"

    images, targets = pictures(1)
    cases: list[tuple[dict[str, Any], Precision, str]] = [
        ({"class_specific": False}, "fp32", "whose map is the same for every class"),
        ({"families": ("cnn",)}, "fp32", "'odd', which it is computed from, does not fit: it fits cnn models"),
        ({"needs": (never,)}, "fp32", "'odd', which it is computed from, does not fit: no model has it"),
        ({"half_precision": False}, "bf16", "method 'odd' needs more than bf16"),
    ]
    for facts, precision, message in cases:
        with registered("odd", **facts), pytest.raises(UsageError, match=message):
            attribute(tiny_vit(), images, targets, method="var", options={"of": "odd"}, precision=precision)
    with registered("odd"):
        assert float(attribute(tiny_vit(), images, targets, method="var", options={"of": "odd"}).abs().max()) == 0


def test_a_flat_network_has_a_map_of_zeros() -> None:
    model = tiny_vit()
    model.module.head.weight.zero_()
    images, targets = pictures(2)
    for options in CLASS_SETS:
        maps = attribute(model, images, targets, method="var", options=options)
        assert float(maps.abs().max()) == 0


def test_a_method_that_learns_from_data_can_be_wrapped() -> None:
    model = tiny_relu_cnn()
    images, targets = pictures(3)
    base = {"name": "visual_tcav", "steps": 2, "concept_count": 2}
    shared = {"method": "var", "options": {"of": base, "k": 3}}
    with pytest.raises(UsageError, match="learns from data before it explains"):
        attribute(model, images, targets, **shared)
    fitted = fit_method(model, images, targets, **shared, parts=quarters(3))
    maps = attribute(model, images, targets, **shared, fitted=fitted)
    alone = attribute(
        model, images, targets, method="visual_tcav", options={"steps": 2, "concept_count": 2}, fitted=fitted
    )
    assert maps.shape == alone.shape
    assert (maps.abs() <= alone.abs() + 1e-12).all()
    assert maps.any()
