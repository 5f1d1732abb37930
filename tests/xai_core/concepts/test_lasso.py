"""LASSO codes against what they promise."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.xai_core.concepts.drawing import normal
from xai_core.concepts import (
    active_set,
    lasso_codes,
)
from xai_core.concepts.active_set import solve
from xai_core.concepts.supports import Supports
from xai_core.errors import UsageError


@given(st.integers(1, 12), st.floats(0.02, 0.8), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_lasso_codes_meet_the_optimality_conditions(count: int, penalty: float, seed: int) -> None:
    atoms = 3 * normal(count, 6, seed=seed)
    vectors = 5 * normal(4, 6, seed=seed + 1)
    codes = lasso_codes(atoms, vectors, penalty).double()
    for x, u in zip(vectors.double(), codes, strict=True):
        for atom, coefficient in zip(atoms.double(), u, strict=True):
            pull = torch.dot(atom, x - u @ atoms.double()) / (x.norm() * atom.norm())
            if coefficient == 0:
                assert abs(pull) <= penalty + 2e-3
            else:
                assert float(pull) == pytest.approx(penalty * float(coefficient.sign()), abs=2e-3)


def test_lasso_of_one_atom_is_soft_thresholding_on_the_original_scale() -> None:
    codes = lasso_codes(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 10.0], [10.0, 0.5], [0.0, -10.0]]))
    torch.testing.assert_close(codes, torch.tensor([[2.25], [0.0], [-2.25]]))


def test_zeros_have_codes_of_zero() -> None:
    codes = lasso_codes(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(codes, torch.tensor([[0.0, 0.0], [0.0, 1.8]]))


def test_the_shapes_of_codes_survive_one_atom_and_one_vector() -> None:
    assert lasso_codes(normal(1, 4), normal(1, 4)).shape == (1, 1)
    assert lasso_codes(normal(3, 4), normal(1, 4)).shape == (1, 3)
    assert lasso_codes(normal(1, 4), normal(3, 4)).shape == (3, 1)
    assert lasso_codes(normal(2, 4), normal(0, 4)).shape == (0, 2)


def _twin(atoms: Tensor, x: Tensor, penalty: float) -> Tensor:
    """Equation 12 for one vector by cyclic coordinate descent in float64, until nothing moves."""
    u = torch.zeros(len(atoms), dtype=torch.float64)
    gram, pull = atoms @ atoms.T, atoms @ x
    for _ in range(20_000):
        before = u.clone()
        for k in gram.diagonal().nonzero().flatten().tolist():
            rest = pull[k] - gram[k] @ u + gram[k, k] * u[k]
            u[k] = rest.sign() * (rest.abs() - penalty).clamp(min=0) / gram[k, k]
        if (u - before).abs().max() < 1e-13:
            break
    return u


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=1)


@pytest.mark.parametrize("penalty", [0.3, 0.05])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_the_solver_equals_slow_coordinate_descent(precision: torch.dtype, penalty: float) -> None:
    atoms, vectors = _unit(normal(20, 9)), _unit(normal(6, 9, seed=1))
    solution = solve(atoms.to(precision), vectors.to(precision), torch.full((6,), penalty, dtype=precision))
    expected = torch.stack([_twin(atoms, x, penalty) for x in vectors])
    tolerance = 1e-4 if precision == torch.float32 else 1e-9
    torch.testing.assert_close(solution.codes.double(), expected, rtol=0, atol=tolerance)
    assert torch.equal(solution.codes != 0, expected.abs() > 1e-9)
    assert not len(solution.open)


@pytest.mark.parametrize("dimensions", [12, 4])
def test_a_move_ends_at_the_minimum_over_the_support_and_lowers_the_objective(dimensions: int) -> None:
    atoms, vectors = _unit(normal(40, dimensions)), _unit(normal(30, dimensions, seed=1))
    padded = torch.cat([atoms, torch.zeros(1, dimensions, dtype=torch.float64)])
    penalty = torch.full((30, 1), 0.03, dtype=torch.float64)
    supports = Supports(30, 40, padded @ padded.T)
    before = torch.full((30,), 0.5, dtype=torch.float64)
    for _ in range(30):
        pull = (vectors - supports.combine(padded)) @ padded.T
        strongest, newcomers = pull.abs().scatter(1, supports.atom, 0.0).topk(8, dim=1)
        fresh = strongest > penalty + 1e-12
        if not fresh.any():
            break
        active = pull.gather(1, supports.atom)
        supports.admit(newcomers, pull.gather(1, newcomers), fresh, active, penalty)
        used = supports.atom < 40
        residual = vectors - supports.combine(padded)
        slope = (residual @ padded.T).gather(1, supports.atom) - penalty * supports.sign
        assert slope.abs().max() < 1e-9
        assert (supports.code * supports.sign >= 0).all()
        assert not supports.code[~used].any()
        after = residual.square().sum(dim=1) / 2 + 0.03 * supports.code.abs().sum(dim=1)
        assert (after < before)[fresh.any(dim=1)].all()
        before = after
        for index in range(30):
            of = supports.atom[index][used[index]]
            inverse = supports.inverse[index][used[index]][:, used[index]]
            identity = torch.eye(len(of), dtype=torch.float64)
            torch.testing.assert_close(inverse @ atoms[of] @ atoms[of].T, identity, atol=1e-6, rtol=0)
    assert not fresh.any()


def test_every_vector_has_a_penalty_and_an_excluded_atom_of_its_own() -> None:
    atoms = _unit(normal(12, 6))
    penalty = torch.linspace(0.02, 0.5, 12, dtype=torch.float64)
    codes = solve(atoms, atoms, penalty, excluded=torch.arange(12)).codes
    assert not codes.diagonal().any()
    for index in range(12):
        allowed = atoms.clone()
        allowed[index] = 0
        torch.testing.assert_close(
            codes[index], _twin(allowed, atoms[index], float(penalty[index])), atol=1e-9, rtol=0
        )


def _objective(atoms: Tensor, vectors: Tensor, codes: Tensor, penalty: float) -> Tensor:
    error = vectors - codes.double() @ atoms
    return error.square().sum(dim=1) / 2 + penalty * codes.double().abs().sum(dim=1)


@pytest.mark.parametrize(
    "atoms",
    [
        pytest.param(normal(300, 3), id="far more atoms than dimensions"),
        pytest.param(normal(40, 8).repeat_interleave(3, dim=0), id="equal atoms"),
        pytest.param(torch.cat([normal(40, 8), -3 * normal(40, 8)]), id="opposite atoms"),
        pytest.param(normal(1, 8) + 1e-3 * normal(60, 8, seed=2), id="atoms that nearly coincide"),
        pytest.param(normal(1, 8) + 1e-5 * normal(60, 8, seed=2), id="atoms that coincide in float32"),
        pytest.param(normal(60, 3) @ normal(3, 8, seed=2), id="atoms of a plane"),
    ],
)
@pytest.mark.parametrize("penalty", [0.1, 1e-3])
def test_degenerate_dictionaries_are_solved_to_the_duality_gap(atoms: Tensor, penalty: float) -> None:
    vectors = torch.cat([normal(50, atoms.shape[1], seed=5), atoms[:10]])
    unit_atoms, unit_vectors = _unit(atoms), _unit(vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = lasso_codes(unit_atoms, unit_vectors, penalty)
    exact = solve(unit_atoms, unit_vectors, torch.full((60,), penalty, dtype=torch.float64)).codes
    residual = unit_vectors - exact @ unit_atoms
    peak = (residual @ unit_atoms.T).abs().amax(dim=1)
    dual_point = residual * (penalty / peak).clamp(max=1).unsqueeze(1)
    dual = (1 - (unit_vectors - dual_point).square().sum(dim=1)) / 2
    optimum = _objective(unit_atoms, unit_vectors, exact, penalty)
    assert float(((optimum - dual) / optimum).max()) < 1e-9
    assert float((_objective(unit_atoms, unit_vectors, codes, penalty) / optimum - 1).max()) < 1e-5
    assert exact.count_nonzero(dim=1).max() <= atoms.shape[1]


def test_a_penalty_near_the_rounding_of_float32_is_solved_in_float64() -> None:
    atoms, vectors = _unit(normal(60, 30)), _unit(normal(20, 30, seed=1))
    exact = solve(atoms, vectors, torch.full((20,), 2e-6, dtype=torch.float64)).codes
    codes = lasso_codes(atoms, vectors, 2e-6)
    assert torch.equal(codes != 0, exact != 0)


def test_float32_finds_the_very_support_of_float64() -> None:
    atoms, vectors = _unit(normal(1, 40) + normal(400, 40, seed=3)), _unit(normal(1, 40) + normal(300, 40, seed=1))
    exact = solve(atoms, vectors, torch.full((300,), 0.05, dtype=torch.float64)).codes
    assert torch.equal(lasso_codes(atoms, vectors, 0.05) != 0, exact != 0)


def test_codes_depend_neither_on_the_block_nor_on_the_other_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, vectors = normal(150, 20), normal(90, 20, seed=1)
    together = lasso_codes(atoms, vectors)
    monkeypatch.setattr(active_set, "ROWS", 7)
    torch.testing.assert_close(lasso_codes(atoms, vectors), together, rtol=0, atol=1e-4)
    alone = torch.cat([lasso_codes(atoms, one) for one in vectors.split(1)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    assert torch.equal(alone != 0, together != 0)


def test_it_says_for_how_many_vectors_the_gap_stayed_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_set, "_IDLE_ROUNDS", 0)
    with pytest.warns(RuntimeWarning, match=r"30 vectors are not exact: after \d+ rounds .* gap is up to"):
        lasso_codes(normal(40, 8), normal(30, 8, seed=1))


def test_codes_have_no_gradient_and_no_rounding_of_an_autocast() -> None:
    atoms, vectors = normal(30, 8), normal(9, 8, seed=1).requires_grad_()
    codes = lasso_codes(atoms, vectors)
    assert not codes.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lasso_codes(atoms, vectors), codes)


@pytest.mark.parametrize(
    ("atoms", "vectors", "penalty", "complaint"),
    [
        (normal(4, 3), normal(2, 3), -1.0, "positive number, got -1"),
        (normal(4, 3), normal(2, 3), float("nan"), "positive number, got nan"),
        (normal(4, 3), normal(2, 5), 0.1, r"got \(4, 3\) and \(2, 5\)"),
        (normal(4, 3), torch.tensor([[1.0, 2.0, float("nan")]]), 0.1, "vectors: .* in 1 of 1"),
        (torch.tensor([[1.0, float("inf")]]), normal(3, 2), 0.1, "atoms: .* in 1 of 1"),
    ],
)
def test_lasso_refuses(atoms: Tensor, vectors: Tensor, penalty: float, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        lasso_codes(atoms, vectors, penalty)
