"""LASSO codes of feature vectors in a dictionary that brings no encoder of its own."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from xai_core.concepts.active_set import GAP, Solution, solve
from xai_core.errors import UsageError
from xai_core.precision import own_modes

LASSO_PENALTY = 0.1
# The gap above which a warning is given.
ACCEPTED_GAP = GAP[torch.float32]
# Vectors whose float64 codes are held beside the float32 ones that are returned.
_CHUNK = 4096


def lasso_codes(atoms: Tensor, vectors: Tensor, penalty: float = LASSO_PENALTY) -> Tensor:
    """LASSO codes ``[N, K]`` float32 of vectors (iERF, equation 12), by the batched solver of :mod:`active_set`.

    Solved for unit-norm vectors and unit-norm atoms, then scaled back, so that one penalty means the same in
    every layer: on the original scale u minimises ``1/2 |x - V u|^2 + penalty |x| sum_j |v_j| |u_j|``.
    A vector or an atom of zeros has codes of zero. Coefficients that the optimum does not have are exactly zero.
    Codes carry no gradient.

    Solved in float32 to a duality gap of 1e-5 of the objective. Vectors that this precision does not bring there
    (a penalty near rounding, atoms that nearly coincide) are solved again in float64, to 1e-10. Should that fail,
    a ``RuntimeWarning`` says for how many vectors, the largest gap that is left and the rounds.

    Args:
        atoms: ``[K, C]``, the concept vectors v_j; vectors: ``[N, C]``, coded on their device.
        penalty: lambda, a share of the pull of an atom that equals the vector: at 1 every code is zero.

    Raises:
        UsageError: a penalty that is not positive, widths that differ, or NaN or infinity in atoms or vectors.
    """
    if not penalty > 0:
        raise UsageError(f"penalty: expected a positive number, got {penalty}; 0.1 is the default")
    if atoms.ndim != 2 or vectors.ndim != 2 or atoms.shape[1] != vectors.shape[1]:
        raise UsageError(
            f"expected atoms [K, C] and vectors [N, C], got {tuple(atoms.shape)} and {tuple(vectors.shape)}; "
            "use vectors of the layer that the atoms are of"
        )
    with own_modes("fp32", vectors.device):
        unit_atoms, atom_norms = _unit(atoms.to(vectors.device), "atoms")
        unit_vectors, vector_norms = _unit(vectors, "vectors")
        penalties = unit_vectors.new_full((len(vectors),), penalty)
        fast = solve(unit_atoms.float(), unit_vectors.float(), penalties.float())
        codes = fast.codes
        for rows in fast.open.split(_CHUNK):
            exact = solve(unit_atoms, unit_vectors[rows], penalties[rows])
            codes[rows] = exact.codes.float()
            _warn(exact)
        return codes.mul_(vector_norms.float()).div_(atom_norms.T.float())


def _unit(vectors: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Unit-norm float64 vectors and their norms ``[N, 1]``; zeros stay zeros, with norm 1."""
    vectors = vectors.detach().double()
    bad = int((~vectors.isfinite()).any(dim=1).sum())
    if bad:
        raise UsageError(
            f"{name}: expected finite numbers, got NaN or infinity in {bad} of {len(vectors)}; leave them out"
        )
    norms = vectors.norm(dim=1, keepdim=True)
    norms = torch.where(norms > 0, norms, 1.0)
    return vectors / norms, norms


def _warn(solution: Solution) -> None:
    inexact = solution.gap[~(solution.gap <= ACCEPTED_GAP)]
    if len(inexact):
        warnings.warn(
            f"LASSO codes of {len(inexact)} vectors are not exact: after {solution.rounds} rounds the duality gap "
            f"is up to {float(inexact.max()):.1e} of the objective; a larger penalty is easier",
            RuntimeWarning,
            stacklevel=3,
        )
