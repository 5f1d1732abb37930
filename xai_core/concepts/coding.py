"""Codes: PFVs as sparse sums of concept vectors, and how well and how sparsely they are rebuilt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary, nonzero
from xai_core.errors import UsageError

LASSO_PENALTY = 0.1
# scikit-learn's 1e-4 leaves coefficients that the optimum does not have; they would count in the l0 ratio.
_DUALITY_GAP = 1e-6
_MOST_ITERATIONS = 10_000


def encode(dictionary: Dictionary, vectors: Tensor, *, penalty: float = LASSO_PENALTY) -> Tensor:
    """Codes u of vectors in a dictionary: its own encoder's, else the LASSO's (iERF, equations 11 and 12).

    Args:
        vectors: ``[N, C]``; penalty: see :func:`lasso_codes`; an encoder ignores it.

    Returns:
        ``[N, K]`` float32 coefficients of the atoms as they are stored.

    Raises:
        UsageError: vectors of another width than the atoms, or a penalty that is not positive.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dictionary.atoms.shape[1]:
        raise UsageError(
            f"vectors: expected shape [N, {dictionary.atoms.shape[1]}] as the atoms have, got "
            f"{tuple(vectors.shape)}; use vectors of the layer that the dictionary was fitted on"
        )
    if not dictionary.encoder:
        return lasso_codes(dictionary.atoms, vectors, penalty)
    weight, bias = (dictionary.encoder[name].to(vectors.device) for name in ("weight", "bias"))
    return torch.relu(vectors.float() @ weight.T + bias)


def lasso_codes(atoms: Tensor, vectors: Tensor, penalty: float = LASSO_PENALTY) -> Tensor:
    """LASSO codes ``[N, K]`` of vectors (iERF, equation 12), solved by coordinate descent.

    Solved for unit-norm vectors and unit-norm atoms, then scaled back, so that one penalty means the same in
    every layer: on the original scale u minimises ``1/2 |x - V u|^2 + penalty |x| sum_j |v_j| |u_j|``.
    A vector or an atom of zeros has codes of zero.

    Raises:
        UsageError: a penalty that is not positive.
    """
    from sklearn.linear_model import Lasso

    if penalty <= 0:
        raise UsageError(f"penalty: expected a positive number, got {penalty}")
    if not len(vectors):
        return torch.zeros(0, len(atoms), device=vectors.device)
    unit_atoms, atom_norms = _unit(atoms)
    unit_vectors, vector_norms = _unit(vectors)
    # scikit-learn divides the squared error by the number of rows, here C.
    lasso = Lasso(
        alpha=penalty / atoms.shape[1],
        fit_intercept=False,
        precompute=True,
        tol=_DUALITY_GAP,
        max_iter=_MOST_ITERATIONS,
    )
    solved = lasso.fit(unit_atoms.T.numpy(), unit_vectors.T.numpy()).coef_
    unit_codes = torch.from_numpy(solved).reshape(len(vectors), len(atoms))
    return (unit_codes * vector_norms / atom_norms.T).float().to(vectors.device)


def reconstruction(dictionary: Dictionary, codes: Tensor) -> Tensor:
    """Vectors ``[N, C]`` rebuilt from codes ``[N, K]``: V u (iERF, equation 11), plus an encoder's offset."""
    rebuilt = codes @ dictionary.atoms.to(codes.device)
    return rebuilt + dictionary.encoder["offset"].to(codes.device) if dictionary.encoder else rebuilt


def rel_l2(vectors: Tensor, rebuilt: Tensor) -> float:
    """Mean over vectors of ``|x - x'|_2 / |x|_2`` (iERF, section VI-A1); lower is better.

    Vectors of zeros have no relative error and are left out; NaN where nothing is left.
    """
    norms = vectors.norm(dim=1)
    errors = (vectors - rebuilt).norm(dim=1)
    return (errors / norms)[norms > 0].mean().item()


def l0_ratio(codes: Tensor) -> float:
    """Mean over vectors of ``1 - |u|_0 / K`` (iERF, section VI-A1): the share of atoms not used."""
    return 1 - codes.ne(0).float().mean().item()


@dataclass(frozen=True)
class Evaluation:
    """How well a dictionary codes ``vectors`` vectors."""

    rel_l2: float
    l0_ratio: float
    vectors: int


def evaluate(
    dictionary: Dictionary,
    vectors: Tensor,
    *,
    penalty: float = LASSO_PENALTY,
    evaluation_vectors: int = 512,
    seed: int = 0,
) -> Evaluation:
    """Relative l2 error and l0 ratio on a seeded sample of the non-zero vectors (iERF, Table III).

    Args:
        vectors: ``[N, C]``; those of the fit measure the fit, others how well it carries over.
        evaluation_vectors: the most vectors that are coded.
    """
    usable = nonzero(vectors.float())
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    chosen = usable[order[:evaluation_vectors].to(usable.device)]
    codes = encode(dictionary, chosen, penalty=penalty)
    return Evaluation(rel_l2(chosen, reconstruction(dictionary, codes)), l0_ratio(codes), len(chosen))


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm float64 vectors on the CPU and their norms ``[N, 1]``; zeros stay zeros, with norm 1."""
    vectors = vectors.detach().double().cpu()
    norms = vectors.norm(dim=1, keepdim=True)
    norms = torch.where(norms > 0, norms, 1.0)
    return vectors / norms, norms
