"""The supports of many LASSO problems over one dictionary, and the moves between supports."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# A support takes in at most so many atoms at once.
NEWCOMERS = 8
_SLOTS = 16
# Squared distance of a unit atom from the span of a support at which it counts as inside, by precision.
_INSIDE = {torch.float32: 1e-4, torch.float64: 1e-10}


class Supports:
    """The atoms that each of n problems uses, in slots ``[n, W]``, and the inverse of their Gram matrix.

    ``atom`` is K in a free slot, where ``sign`` and ``code`` are 0 and ``inverse`` ``[n, W, W]`` has zeros.
    Between moves the codes are the minimum over the support with the signs fixed, up to rounding.
    """

    def __init__(self, count: int, atoms: int, gram: Tensor) -> None:
        self.free = atoms
        self.atom = torch.full((count, _SLOTS), atoms, device=gram.device)
        self.sign = gram.new_zeros(count, _SLOTS)
        self.code = gram.new_zeros(count, _SLOTS)
        self.inverse = gram.new_zeros(count, _SLOTS, _SLOTS)
        self._gram = gram.flatten()
        self._side = len(gram)
        self._inside = _INSIDE[gram.dtype]

    def combine(self, atoms: Tensor) -> Tensor:
        """The vectors ``[n, C]`` that the codes stand for; ``atoms`` has zeros behind the dictionary."""
        return F.embedding_bag(self.atom, atoms, per_sample_weights=self.code, mode="sum")

    def keep(self, rows: Tensor) -> None:
        """Forgets all problems but some."""
        for name in ("atom", "sign", "code", "inverse"):
            setattr(self, name, getattr(self, name).index_select(0, rows))

    def admit(self, newcomers: Tensor, pull: Tensor, fresh: Tensor, active: Tensor, penalty: Tensor) -> None:
        """Takes atoms into the supports and moves to the minimum over each.

        Args:
            newcomers: atoms ``[n, NEWCOMERS]`` that are in no support, the strongest first; pull: theirs.
            fresh: which of them to take: those that pull more than the penalty ``[n, 1]``.
            active: the pulls of the supports' own atoms ``[n, W]``.
        """
        if int((self.atom == self.free).sum(dim=1).amin()) < newcomers.shape[1]:
            self._widen()
            active = F.pad(active, (0, _SLOTS))
        sign = pull.sign() * fresh
        slope = active - penalty * self.sign
        start, fresh, lift, schur = self._make_room(newcomers, sign, fresh)
        slope_new = pull - penalty * sign
        fresh, factor = self._choose(schur, slope_new, sign, start, fresh)
        both = fresh.unsqueeze(2) & fresh.unsqueeze(1)
        slots = (self.atom == self.free).float().topk(newcomers.shape[1], dim=1).indices
        # The inverse of a bordered matrix, for all newcomers at once.
        border = lift.scatter_(2, slots.unsqueeze(2), -1.0)
        self.inverse.baddbmm_(border.mT, (torch.cholesky_inverse(factor) * both) @ border)
        self.atom.scatter_(1, slots, torch.where(fresh, newcomers, self.free))
        self.sign.scatter_(1, slots, sign * fresh)
        self.code.scatter_(1, slots, start * fresh)
        self._settle(slope.scatter(1, slots, slope_new * fresh))

    def _make_room(self, newcomers: Tensor, sign: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trades atoms of the support for a newcomer inside their span, at no change of what the codes stand for.

        Without it a support that spans all C dimensions could not change.

        Returns:
            The newcomers' codes after the trade, which newcomers are left, their coefficients in the
            support's atoms ``[n, NEWCOMERS, W]`` and the Gram matrix of what these leave of them.
        """
        start = torch.zeros_like(sign)
        while True:
            lift, schur = self._project(newcomers)
            rows = (fresh[:, 0] & (schur[:, 0, 0] < self._inside)).nonzero().flatten()
            if not len(rows):
                return start, fresh, lift, schur
            fresh = fresh.clone()
            fresh[rows, 1:] = False
            code, trade = self.code[rows], lift[rows, 0] * sign[rows, :1]
            reach, slot = torch.where(trade * self.sign[rows] > 0, code / trade, torch.inf).min(dim=1)
            endless = reach.isinf()
            fresh[rows[endless]] = False
            rows, slot, reach = rows[~endless], slot[~endless], reach[~endless]
            self.code[rows] = code[~endless] - reach.unsqueeze(1) * trade[~endless]
            start[rows, 0] += reach * sign[rows, 0]
            self._drop(rows, slot)

    def _project(self, newcomers: Tensor) -> tuple[Tensor, Tensor]:
        cross = self._products(newcomers, self.atom)
        lift = cross @ self.inverse
        return lift, torch.baddbmm(self._products(newcomers, newcomers), lift, cross.mT, alpha=-1)

    def _products(self, first: Tensor, second: Tensor) -> Tensor:
        """Inner products of atoms, ``[n, A, B]`` for numbers ``[n, A]`` and ``[n, B]``."""
        place = (first * self._side).unsqueeze(2) + second.unsqueeze(1)
        return self._gram.index_select(0, place.flatten()).view(place.shape)

    def _choose(
        self, schur: Tensor, slope: Tensor, sign: Tensor, start: Tensor, fresh: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The newcomers that all move in the direction of their pull, and the Cholesky factor of their matrix.

        One of them always does: the direction is one of descent. Where they depend on each other the strongest
        alone is taken.
        """
        fresh = fresh.clone()
        factor = torch.zeros_like(schur)
        identity = torch.eye(schur.shape[1], dtype=schur.dtype, device=schur.device)
        rows = torch.arange(len(schur), device=schur.device)
        while len(rows):
            taken = fresh[rows]
            both = taken.unsqueeze(2) & taken.unsqueeze(1)
            lower, failed = torch.linalg.cholesky_ex(torch.where(both, schur[rows], identity))
            step = torch.cholesky_solve((slope[rows] * taken).unsqueeze(2), lower).squeeze(2)
            against = (step * sign[rows] < 0) & (start[rows] == 0)
            thin = (lower.diagonal(dim1=1, dim2=2).square() < self._inside).any(dim=1)
            alone = ((failed > 0) | thin) & (taken.sum(dim=1) > 1)
            left = taken & torch.where(alone.unsqueeze(1), identity[0] > 0, ~against)
            factor[rows] = lower
            fresh[rows] = left
            rows = rows[(left != taken).any(dim=1)]
        return fresh, factor

    def _settle(self, slope: Tensor) -> None:
        """Moves to the minimum over each support with the signs fixed; what reaches zero on the way leaves.

        ``slope`` ``[n, W]`` is minus the gradient of the objective by the codes: it shrinks as the move goes on.
        """
        rows = torch.arange(len(slope), device=slope.device)
        while len(rows):
            everything = len(rows) == len(self.code)
            inverse = self.inverse if everything else self.inverse.index_select(0, rows)
            step = (inverse @ slope.unsqueeze(2)).squeeze(2)
            code = self.code[rows]
            zero, slot = torch.where(step * self.sign[rows] < 0, -code / step, torch.inf).min(dim=1)
            self.code[rows] = code + zero.clamp(max=1).unsqueeze(1) * step
            blocked = zero < 1
            rows, slot, zero = rows[blocked], slot[blocked], zero[blocked]
            slope = slope[blocked] * (1 - zero).unsqueeze(1)
            self._drop(rows, slot)

    def _drop(self, rows: Tensor, slot: Tensor) -> None:
        """Takes one atom out of each of some supports."""
        inverse = self.inverse.index_select(0, rows)
        place = slot.view(-1, 1, 1).expand(-1, 1, inverse.shape[2])
        row = inverse.gather(1, place)
        pivot = row.gather(2, slot.view(-1, 1, 1))
        inverse.baddbmm_(row.mT, row / pivot, alpha=-1)
        inverse.scatter_(1, place, 0.0).scatter_(2, place.mT, 0.0)
        self.inverse.index_copy_(0, rows, inverse)
        self.atom[rows, slot] = self.free
        self.sign[rows, slot] = 0.0
        self.code[rows, slot] = 0.0

    def _widen(self) -> None:
        self.atom = F.pad(self.atom, (0, _SLOTS), value=self.free)
        self.sign, self.code = (F.pad(one, (0, _SLOTS)) for one in (self.sign, self.code))
        self.inverse = F.pad(self.inverse, (0, _SLOTS, 0, _SLOTS))
