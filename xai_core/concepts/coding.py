"""Codes: PFVs as sparse sums of concept vectors, and how well and how sparsely they are rebuilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.concepts.dictionary import Dictionary, nonzero
from xai_core.concepts.lasso import LASSO_PENALTY, lasso_codes
from xai_core.errors import UsageError
from xai_core.precision import full_precision


def encode(dictionary: Dictionary, vectors: Tensor, *, penalty: float = LASSO_PENALTY) -> Tensor:
    """Codes u of vectors in a dictionary: its own encoder's, else the LASSO's (iERF, equations 11 and 12).

    An encoder's codes are ``x W^T + b`` where a latent fires, else 0. With ``threshold`` a latent fires where that
    exceeds its threshold; with ``top_k`` where it is among the vector's k largest and positive; with neither where
    it is positive. They can be differentiated by the vectors (a latent that is off has no gradient); the LASSO's
    codes cannot.

    Args:
        vectors: ``[N, C]``; penalty: see :func:`lasso_codes`; one off its default is refused by an encoder.

    Returns:
        ``[N, K]`` coefficients of the atoms as they are stored; the LASSO's in float32, an encoder's in the
        precision of the vectors, float32 at least.

    Raises:
        UsageError: vectors of another width than the atoms, a penalty that is not positive or that nothing reads.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dictionary.atoms.shape[1]:
        raise UsageError(
            f"vectors: expected shape [N, {dictionary.atoms.shape[1]}] as the atoms have, got "
            f"{tuple(vectors.shape)}; use vectors of the layer that the dictionary was fitted on"
        )
    if not dictionary.encoder:
        return lasso_codes(dictionary.atoms, vectors, penalty)
    if penalty != LASSO_PENALTY:
        raise UsageError(
            f"penalty: expected its default, {LASSO_PENALTY}, where the dictionary brings an encoder, got "
            f"{penalty}; only LASSO codes have one"
        )
    with full_precision(vectors.device):
        vectors = wide(vectors)
        encoder = {
            name: tensor.to(vectors.device, vectors.dtype if tensor.is_floating_point() else None)
            for name, tensor in dictionary.encoder.items()
        }
        before = vectors @ encoder["weight"].T + encoder["bias"]
        fires = next((rule for name, rule in _FIRES.items() if name in encoder), _positive)
        return torch.where(fires(before, encoder), before, 0.0)


def _positive(before: Tensor, encoder: Mapping[str, Tensor]) -> Tensor:
    return before > 0


def _above_threshold(before: Tensor, encoder: Mapping[str, Tensor]) -> Tensor:
    return before > encoder["threshold"]


def _among_largest(before: Tensor, encoder: Mapping[str, Tensor]) -> Tensor:
    largest = before.topk(min(int(encoder["top_k"]), before.shape[1]), dim=1).indices
    return torch.zeros_like(before, dtype=torch.bool).scatter_(1, largest, True) & (before > 0)


# When a latent fires, by the tensor of the encoder that says so.
_FIRES: dict[str, Callable[[Tensor, Mapping[str, Tensor]], Tensor]] = {
    "threshold": _above_threshold,
    "top_k": _among_largest,
}


def reconstruction(dictionary: Dictionary, codes: Tensor) -> Tensor:
    """Vectors ``[N, C]`` rebuilt from codes ``[N, K]``: V u (iERF, equation 11), plus an encoder's offset."""
    with full_precision(codes.device):
        rebuilt = codes @ dictionary.atoms.to(codes)
        return rebuilt + dictionary.encoder["offset"].to(codes) if dictionary.encoder else rebuilt


def rel_l2(vectors: Tensor, rebuilt: Tensor) -> float:
    """Mean over vectors of ``|x - x'|_2 / |x|_2`` (iERF, section VI-A1); lower is better.

    Vectors of zeros have no relative error and are left out; NaN where nothing is left.
    """
    return _relative_errors(vectors, rebuilt).mean().item()


def l0_ratio(codes: Tensor) -> float:
    """Mean over vectors of ``1 - |u|_0 / K`` (iERF, section VI-A1): the share of atoms not used."""
    return _unused_shares(codes).mean().item()


def _relative_errors(vectors: Tensor, rebuilt: Tensor) -> Tensor:
    norms = vectors.norm(dim=1)
    return ((vectors - rebuilt).norm(dim=1) / norms)[norms > 0].double()


def _unused_shares(codes: Tensor) -> Tensor:
    return 1 - codes.count_nonzero(dim=1).double() / codes.shape[1]


@dataclass(frozen=True)
class Evaluation:
    """How well a dictionary codes ``vectors`` vectors: means over them, and the standard errors of these means.

    A standard error is the standard deviation over the vectors (divisor n - 1) over sqrt(n), NaN for fewer than
    two vectors: a mean plus and minus 1.96 of them is an interval of 95 % for vectors drawn like these. Vectors
    of one image resemble each other, so that it is too narrow where many come from the same image.
    """

    rel_l2: float
    l0_ratio: float
    vectors: int
    rel_l2_error: float = math.nan
    l0_ratio_error: float = math.nan


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
    usable = nonzero(vectors.detach().float())
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    chosen = usable[order[:evaluation_vectors].to(usable.device)]
    codes = encode(dictionary, chosen, penalty=penalty)
    errors = _relative_errors(chosen, reconstruction(dictionary, codes))
    unused = _unused_shares(codes)
    return Evaluation(
        rel_l2=errors.mean().item(),
        l0_ratio=unused.mean().item(),
        vectors=len(chosen),
        rel_l2_error=_standard_error(errors),
        l0_ratio_error=_standard_error(unused),
    )


def _standard_error(values: Tensor) -> float:
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
