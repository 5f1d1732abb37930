"""Locality of latents against a loop over pairs of cells, and at its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts.cafe import Locality, locality
from xai_core.errors import UsageError


def _point(row: int, column: int, side: int = 5) -> Tensor:
    cells = torch.zeros(1, side, side)
    cells[0, row, column] = 2.0
    return cells


def _assert_same(found: Locality, expected: Locality) -> None:
    torch.testing.assert_close(list(vars(found).values()), list(vars(expected).values()))


def _slow(activation: Tensor, field: Tensor) -> tuple[float, float, float, float]:
    """The four measures of one pair of maps of the same grid, from their definitions, in Python floats."""
    rows, columns = activation.shape
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    diagonal = math.hypot(rows - 1, columns - 1)

    def mass(values: Tensor) -> list[float]:
        positive = [max(0.0, float(values[cell])) for cell in cells]
        return [value / sum(positive) for value in positive]

    def apart(left: list[float], right: list[float]) -> float:
        return sum(
            one * other * math.dist(here, there) / diagonal
            for one, here in zip(left, cells, strict=True)
            for other, there in zip(right, cells, strict=True)
        )

    def spread(values: list[float]) -> float:
        centre = [sum(value * cell[axis] for value, cell in zip(values, cells, strict=True)) for axis in (0, 1)]
        return (
            math.sqrt(sum(value * math.dist(cell, centre) ** 2 for value, cell in zip(values, cells, strict=True)))
            / diagonal
        )

    fires, evidence = mass(activation), mass(field)
    core: set[int] = set()
    for index in sorted(range(len(cells)), key=lambda one: (-fires[one], one)):
        if sum(fires[one] for one in core) >= 0.5:
            break
        core.add(index)
    outside = sum(value for index, value in enumerate(evidence) if index not in core)
    return (
        apart(fires, evidence) - apart(fires, fires) / 2 - apart(evidence, evidence) / 2,
        outside / (1 - len(core) / len(cells)),
        spread(fires),
        spread(evidence),
    )


def test_every_measure_equals_a_loop_over_pairs_of_cells() -> None:
    activation, field = normal(6, 4, 7, seed=1), normal(6, 4, 7, seed=2)
    found = locality(activation, field)
    for index in range(6):
        slow = _slow(activation[index].double(), field[index].double())
        fast = [float(one[index]) for one in vars(found).values()]
        assert fast == pytest.approx(slow, rel=1e-5)


def test_two_points_are_as_far_apart_as_they_are() -> None:
    activation = torch.cat([_point(0, 0), _point(0, 0), _point(2, 2)])
    field = torch.cat([_point(4, 4), _point(3, 0), _point(2, 2)])
    found = locality(activation, field)
    torch.testing.assert_close(found.distance, torch.tensor([1.0, 3 / math.hypot(4, 4), 0.0]))
    torch.testing.assert_close(found.outside, torch.tensor([25 / 24, 25 / 24, 0.0]))
    assert not found.activation_spread.any()
    assert not found.field_spread.any()


def test_the_widest_spread_is_half_a_diagonal() -> None:
    corners = _point(0, 0) + _point(4, 4)
    found = locality(corners, _point(2, 2))
    assert float(found.activation_spread) == pytest.approx(0.5)
    assert float(found.distance) > 0.2


def test_scattered_firing_about_one_cause_is_less_local_than_firing_on_it_and_even_evidence_is_chance() -> None:
    cause = _point(2, 2)
    found = locality(torch.cat([cause, torch.ones(1, 5, 5)]), torch.cat([cause, cause]))
    assert found.distance[1] > 0.1 > found.distance[0]
    even = locality(normal(1, 5, 5).abs(), torch.ones(1, 5, 5))
    assert float(even.outside) == pytest.approx(1.0)


def test_maps_of_other_resolutions_are_averaged_to_the_coarser_and_to_28_cells() -> None:
    activation, field = normal(3, 4, 4).abs(), normal(3, 64, 64, seed=3).abs()
    averaged = torch.nn.functional.adaptive_avg_pool2d(field, 4)
    _assert_same(locality(activation, field), locality(activation, averaged))
    fine = normal(2, 140, 140).abs()
    coarse = torch.nn.functional.adaptive_avg_pool2d(fine, 28)
    _assert_same(locality(fine, fine.flip(1)), locality(coarse, coarse.flip(1)))


def test_scale_does_not_matter_and_what_has_nothing_positive_is_undefined() -> None:
    activation, field = normal(2, 4, 4), normal(2, 4, 4, seed=1)
    _assert_same(locality(activation, field), locality(1e-3 * activation, 1e3 * field))
    empty = locality(torch.stack([torch.zeros(4, 4), activation[0]]), torch.stack([field[0], -field[1].abs()]))
    assert all(one.isnan().all() for one in vars(empty).values())
    assert locality(torch.zeros(0, 4, 4), torch.zeros(0, 8, 8)).distance.shape == (0,)


def test_the_core_ends_as_soon_as_it_holds_half() -> None:
    two = _point(1, 1) + _point(3, 3)
    assert float(locality(two, _point(1, 1)).outside) == 0
    assert float(locality(two, _point(3, 3)).outside) == pytest.approx(25 / 24)


def test_a_core_of_the_whole_map_and_a_map_of_one_cell_have_no_outside() -> None:
    one = locality(torch.ones(1, 1, 1), torch.ones(1, 3, 3))
    assert one.outside.isnan().all()
    assert [float(one.distance), float(one.activation_spread), float(one.field_spread)] == [0, 0, 0]


def test_half_precision_is_read_as_numbers_and_autocast_does_not_round() -> None:
    activation, field = normal(2, 8, 8).abs(), normal(2, 8, 8, seed=1).abs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = locality(activation, field)
    torch.testing.assert_close(rounded.distance, locality(activation, field).distance, rtol=0, atol=0)
    halves = locality(activation.half(), field.half()).distance
    torch.testing.assert_close(halves, locality(activation, field).distance, rtol=1e-2, atol=1e-4)


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"got \(2, 4, 4\) and \(3, 4, 4\)"):
        locality(torch.ones(2, 4, 4), torch.ones(3, 4, 4))
