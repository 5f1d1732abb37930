"""The order of scores, relaxed by Gumbel-Sinkhorn (Mena et al. 2018) so that gradients reach the scores.

An order that puts the score s_j at place i earns w_i s_j, and the places' worths w fall: by the rearrangement
inequality the sum is largest where the scores are sorted, highest first. The relaxed order is the one P that
maximises sum P_ij w_i s_j + temperature * entropy(P) among all P >= 0 whose rows add to the places' sizes and
whose columns add to 1. With places of size 1 it is doubly stochastic: Sinkhorn's operator of w s^T / temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from xai_core.precision import full_precision

#: Newton's steps behind Sinkhorn's iterations: quadratic, they end at rounding from what those leave.
NEWTON_STEPS = 5
#: Of the rows' sizes, added to a matrix that is singular where the order is hard already.
RIDGE = 1e-6


def relaxed_order(scores: Tensor, sizes: Tensor, temperature: float, *, iterations: int = 5) -> Tensor:
    """The relaxed order of scores, highest first; as the temperature falls it tends to :func:`hard_order`.

    Scores and places are standardised, so that the temperature means the same whatever their scale and number:
    a score is spread over about 0.3 sqrt(temperature) of the whole order.

    Args:
        scores: ``[B, n]``; sizes: whole numbers ``[m]`` that add to n, how many scores each place takes; n ones
            make a permutation.
        iterations: Sinkhorn's, before Newton's.

    Returns:
        ``[B, m, n]`` in the scores' type: columns add to 1, rows to ``sizes``, both to 1e-6 in float32 while a
        score is spread over more than about one place; where nearly all of the order is hard already, a row may be
        off by some hundredths of its size. Its gradient is the solution's, by the implicit function theorem: no
        iteration is kept. Memory: about five times the result's.
    """
    with full_precision(scores.device):
        return _Order.apply(standardised(scores), place_worths(sizes).to(scores), sizes, temperature, iterations)


def hard_order(scores: Tensor, sizes: Tensor) -> Tensor:
    """The order itself as a matrix of zeros and ones ``[B, m, n]``; ties go by their index."""
    place = torch.repeat_interleave(torch.arange(len(sizes), device=scores.device), sizes.to(scores.device))
    order = scores.argsort(dim=1, descending=True, stable=True)
    found = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    return (found.unsqueeze(1) == torch.arange(len(sizes), device=scores.device).view(-1, 1)).to(scores.dtype)


def straight_through(relaxed: Tensor, scores: Tensor, sizes: Tensor) -> Tensor:
    """The hard order of the scores with the gradient of the relaxed one."""
    return hard_order(scores.detach(), sizes) + (relaxed - relaxed.detach())


def with_gumbel_noise(scores: Tensor, scale: float, generator: Generator) -> Tensor:
    """Standardised scores plus Gumbel noise: their hard order is drawn from Plackett and Luce's distribution.

    (Yellott 1977: with worths exp(score / scale).) The noise enters the n scores, not the n x n entries of their
    matrix as in Mena et al.: the relaxed order of noisy scores then still tends to a sort, not to a matching.

    Args:
        generator: on the CPU, so that all devices draw the same.
    """
    if scale == 0:
        return scores
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    noise = -(-(uniform.clamp(1e-12, 1 - 1e-12)).log()).log()
    return standardised(scores) + scale * noise.to(scores)


def standardised(scores: Tensor) -> Tensor:
    """Each row ``[B, n]`` with mean 0 and deviation 1; zeros where it is constant."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    deviation = (centred.square().mean(dim=1, keepdim=True) + torch.finfo(scores.dtype).tiny).sqrt()
    return centred / deviation


def place_worths(sizes: Tensor) -> Tensor:
    """The worth of each place ``[m]``, falling: minus the middle of its ranks, standardised over the scores."""
    ends = sizes.double().cumsum(0)
    middle = ends - sizes / 2
    centred = ends[-1] / 2 - middle
    spread = ((centred.square() * sizes).sum() / ends[-1]).sqrt()
    return centred / spread if len(sizes) > 1 else centred


class _Order(torch.autograd.Function):
    """The solution of the entropic transport, and its gradient with respect to the scores."""

    @staticmethod
    def forward(
        context: Any, scores: Tensor, worths: Tensor, sizes: Tensor, temperature: float, iterations: int
    ) -> Tensor:
        sizes = sizes.to(scores)
        order = _solve(scores, worths, sizes, temperature, iterations)
        context.save_for_backward(order, worths, sizes)
        context.temperature = temperature
        return order

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """P = exp(w s^T / temperature + a 1^T + 1 b^T), where a and b follow the scores as the sums stay."""
        order, worths, sizes = context.saved_tensors
        weighted = order * gradient
        columns = weighted.sum(dim=1)
        rows = _solve_rows(order, sizes, weighted.sum(dim=2) - _times(order, columns))
        columns = columns - _times(order.transpose(1, 2), rows)
        weighted.sub_(order * rows.unsqueeze(2)).sub_(order * columns.unsqueeze(1))
        return torch.einsum("bij,i->bj", weighted, worths) / context.temperature, None, None, None, None


def _solve(scores: Tensor, worths: Tensor, sizes: Tensor, temperature: float, iterations: int) -> Tensor:
    """Sinkhorn's iterations and Newton's steps, from the hard order's potentials, which are known in closed form.

    The kernel is taken relative to these potentials: no entry is above 1, and each score's at its own place is 1,
    so that no temperature makes a row or a column vanish. Of Newton's steps each image keeps the best.
    """
    exponent = worths.view(1, -1, 1) * scores.unsqueeze(1) - _sorted_potentials(scores, worths, sizes).unsqueeze(2)
    kernel = (exponent - exponent.amax(dim=1, keepdim=True)).div_(temperature).exp_()
    across = kernel.transpose(1, 2)
    columns = 1 / kernel.sum(dim=1)
    rows = sizes / _times(kernel, columns)
    for _ in range(iterations):
        columns = 1 / _times(across, rows)
        rows = sizes / _times(kernel, columns)
    best, least = rows, torch.full_like(rows[:, :1], torch.inf)
    for last in [False] * NEWTON_STEPS + [True]:
        order = rows.unsqueeze(2) * kernel / _times(across, rows).unsqueeze(1)
        missing = sizes - order.sum(dim=2)
        error = (missing.abs() / sizes).amax(dim=1, keepdim=True)
        best, least = torch.where(error < least, rows, best), torch.minimum(error, least)
        if last:
            break
        step = _solve_rows(order, sizes, missing)
        # The dual is a sum of log-sum-exps: so much of a step of this range does not overshoot (Bach 2010).
        reach = (step.amax(dim=1, keepdim=True) - step.amin(dim=1, keepdim=True)).clamp(min=1e-6)
        rows = rows * ((step - step.mean(dim=1, keepdim=True)) * (reach.log1p() / reach)).exp()
    columns = 1 / _times(across, best)
    return kernel.mul_(best.unsqueeze(2)).mul_(columns.unsqueeze(1))


def _sorted_potentials(scores: Tensor, worths: Tensor, sizes: Tensor) -> Tensor:
    """The places' dual potentials ``[B, m]`` of the transport at temperature 0, whose solution is the sort.

    Between neighbouring places the potential falls by the difference of their worths times the score that parts
    them: then no score earns more elsewhere than where the sort puts it.
    """
    ranked = scores.sort(dim=1, descending=True).values
    cuts = sizes.cumsum(0)[:-1].long()
    parting = (ranked[:, cuts - 1] + ranked[:, cuts]) / 2
    return torch.cat([torch.zeros_like(ranked[:, :1]), (parting * worths.diff()).cumsum(dim=1)], dim=1)


def _solve_rows(order: Tensor, sizes: Tensor, given: Tensor) -> Tensor:
    """x ``[B, m]`` with (diag(sizes) - P P^T) x = given, made regular along the ones that it sends to 0."""
    matrix = torch.diag(sizes * (1 + RIDGE)) + sizes.outer(sizes) / sizes.sum() - order @ order.transpose(1, 2)
    return torch.linalg.solve_ex(matrix, given.unsqueeze(2))[0].squeeze(2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(2)).squeeze(2)
