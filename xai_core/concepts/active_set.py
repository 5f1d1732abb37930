"""Many LASSO problems over one dictionary, solved together and exactly by an active-set method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.supports import NEWCOMERS, Supports

# Vectors solved together: more feed the matrix product better, and hold more memory.
ROWS = 2048
# Leave when so many rounds in a row brought nothing: the precision is used up.
_IDLE_ROUNDS = 8
# Supports are copied without the solved ones when these are at least one in so many.
_SOLVED_SHARE = 10
# The relative duality gap at which a problem is solved, by precision.
GAP = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Solution:
    """Codes ``[N, K]``, the duality gap that is left ``[N]``, relative to the objective, and the most rounds."""

    codes: Tensor
    gap: Tensor
    rounds: int

    @property
    def open(self) -> Tensor:
        """The rows whose gap is not closed to the precision's :data:`GAP`."""
        return (~(self.gap <= GAP[self.codes.dtype])).nonzero().flatten()


def solve(atoms: Tensor, vectors: Tensor, penalty: Tensor, excluded: Tensor | None = None) -> Solution:
    """Codes u that minimise ``1/2 |x - V u|^2 + penalty |u|_1`` for every vector x (iERF, equation 12).

    A primal active-set method (Osborne et al. 2000, On the LASSO and its dual), for :data:`ROWS` vectors in step.
    A round finds the pull ``v_j . (x - V u)`` of every atom in one matrix product, takes the strongest of those
    beyond the penalty into each vector's support, and moves to the minimum over the support with signs fixed;
    a coefficient that reaches zero on the way leaves the support. The objective falls in every round and there are
    finitely many supports: the end is the optimum. A problem whose duality gap is closed leaves; one that
    eight rounds in a row did not improve leaves with the gap that it has.

    Args:
        atoms: unit vectors ``[K, C]`` or zeros; vectors: ``[N, C]`` of norm 1 at most. Their type, float32 or
            float64, is the precision of the arithmetic. K^2 numbers are held beside the codes.
        penalty: ``[N]``, positive; excluded: ``[N]``, the one atom that each vector must not use.
    """
    # Atoms of zeros behind all others: free slots of a support point to the first of them.
    padded = F.pad(atoms, (0, 0, 0, max(1, NEWCOMERS - len(atoms))))
    gram = padded @ padded.T
    codes, gap = vectors.new_zeros(len(vectors), len(atoms)), vectors.new_zeros(len(vectors))
    workspace = vectors.new_empty(2, min(ROWS, len(vectors)), len(padded))
    rounds = 0
    for rows in torch.arange(len(vectors), device=vectors.device).split(ROWS):
        problems = _Problems(
            rows=rows,
            vectors=vectors[rows],
            penalty=penalty[rows, None],
            excluded=torch.full_like(rows, len(atoms))[:, None] if excluded is None else excluded[rows, None],
            lowest=vectors.new_full((len(rows),), torch.inf),
            idle=torch.zeros_like(rows),
            supports=Supports(len(rows), len(atoms), gram),
        )
        rounds = max(rounds, problems.run(padded, workspace, codes, gap))
    return Solution(codes, gap, rounds)


@dataclass
class _Problems:
    """The vectors of a block that are not solved, with their supports; ``rows`` are their places outside."""

    rows: Tensor
    vectors: Tensor
    penalty: Tensor
    excluded: Tensor
    lowest: Tensor
    idle: Tensor
    supports: Supports

    def run(self, padded: Tensor, workspace: Tensor, codes: Tensor, gap: Tensor) -> int:
        """Rounds until all are solved; their codes and gaps are written where ``rows`` say."""
        rounds = 0
        while True:
            residual = self.vectors - self.supports.combine(padded)
            pull = torch.mm(residual, padded.T, out=workspace[0, : len(residual)])
            active = pull.gather(1, self.supports.atom)
            strength = torch.abs(pull, out=workspace[1, : len(residual)])
            strength.scatter_(1, self.excluded, 0.0).scatter_(1, self.supports.atom, 0.0)
            strongest, newcomers = strength.topk(NEWCOMERS, dim=1)
            pulls = pull.gather(1, newcomers)
            left = self._gap(residual, torch.maximum(strongest[:, 0], active.abs().amax(dim=1)))
            fresh = strongest > self.penalty + 2 * torch.finfo(pull.dtype).eps
            leaving = (left <= GAP[pull.dtype]) | (self.idle >= _IDLE_ROUNDS)
            some = int(leaving.sum())
            if some * _SOLVED_SHARE >= len(leaving) or (some and len(leaving) < 64):
                self._write(leaving, left, codes, gap)
                if some == len(leaving):
                    return rounds
                stay = (~leaving).nonzero().flatten()
                pulls, active, newcomers, fresh = (
                    one.index_select(0, stay) for one in (pulls, active, newcomers, fresh)
                )
                self._keep(stay)
            self.supports.admit(newcomers, pulls, fresh, active, self.penalty)
            rounds += 1

    def _gap(self, residual: Tensor, peak: Tensor) -> Tensor:
        """The relative duality gap ``[n]``: the dual point is the residual, scaled till no atom pulls too much."""
        error = residual.square().sum(dim=1)
        primal = error / 2 + self.penalty[:, 0] * self.supports.code.abs().sum(dim=1)
        scale = (self.penalty[:, 0] / peak).clamp(max=1)
        dual = scale * (self.vectors * residual).sum(dim=1) - scale.square() * error / 2
        self.idle = torch.where(primal < self.lowest, 0, self.idle + 1)
        self.lowest = torch.minimum(primal, self.lowest)
        return torch.where(primal > 0, (primal - dual) / primal, 0.0)

    def _write(self, which: Tensor, left: Tensor, codes: Tensor, gap: Tensor) -> None:
        which = which.nonzero().flatten()
        rows, atom = self.rows[which], self.supports.atom[which]
        # Free slots hold zeros, which may go anywhere.
        place = (rows.unsqueeze(1), atom.clamp(max=codes.shape[1] - 1))
        codes.index_put_(place, self.supports.code[which], accumulate=True)
        gap[rows] = left[which]

    def _keep(self, stay: Tensor) -> None:
        for name in ("rows", "vectors", "penalty", "excluded", "lowest", "idle"):
            setattr(self, name, getattr(self, name).index_select(0, stay))
        self.supports.keep(stay)
