"""Loss and gradients of a batch, written out: five matrix products, and no tensor of the codes' size made anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from xai_core.concepts.sae.model import Autoencoder
from xai_core.concepts.sae.variants import next_largest


@dataclass(frozen=True)
class Objective:
    """A variant with its options at one size: see :class:`xai_core.concepts.sae.variants.Variant`."""

    floor: Callable[[Tensor], Tensor] | None
    prefixes: tuple[int, ...]
    penalty: float


@dataclass(frozen=True)
class Passed:
    """What a batch gave: ``loss`` ``[]``, errors ``x' - x`` ``[B, C]``, sums of codes ``[K]``, the mean floor."""

    loss: Tensor
    error: Tensor
    sums: Tensor
    floor: Tensor


@torch.no_grad()
def backpropagate(model: Autoencoder, x: Tensor, objective: Objective, codes: Tensor, scratch: Tensor) -> Passed:
    """Writes the codes of vectors ``x [B, C]`` into ``codes``, and their loss's gradients into the parameters'.

    The floor has no gradient, as the threshold of ReLU has none. Prefixes build upon each other, so that all of
    them together cost one decoding: group g of the latents is in the reconstructions of all prefixes from g on, so
    its gradient is that of the sum of their errors. Of the offset, the gradient through the encoder is taken after
    the sum over the batch: that of every vector would be a sixth product.

    Args:
        codes, scratch: ``[B, K]``, to be overwritten.
    """
    centred = x - model.b_d
    torch.addmm(model.b_e, centred, model.W_e.T, out=codes)
    floor = fire(codes, objective.floor, scratch)
    groups = list(pairwise((0, *objective.prefixes)))
    errors = [-centred]
    for low, high in groups:
        errors.append(torch.addmm(errors[-1], codes[:, low:high], model.W_d[low:high]))
    del errors[0]
    missed = torch.zeros_like(x)
    grad = model.gradients
    for (low, high), error in zip(reversed(groups), reversed(errors), strict=True):
        missed.add_(error, alpha=1 / len(x))
        torch.mm(codes[:, low:high].T, missed, out=grad.W_d[low:high])
        torch.mm(missed, model.W_d[low:high].T, out=scratch[:, low:high])
    if objective.penalty:
        scratch.add_(objective.penalty / len(x))
    torch.ops.aten.threshold_backward.grad_input(scratch, codes, 0, grad_input=scratch)
    torch.sum(scratch, dim=0, out=grad.b_e)
    torch.mm(scratch.T, centred, out=grad.W_e)
    torch.sum(missed, dim=0, out=grad.b_d).sub_(grad.b_e @ model.W_e)
    sums = codes.sum(dim=0)
    squares = torch.stack([error.norm() for error in errors]).square().sum()
    return Passed((squares / 2 + objective.penalty * sums.sum()) / len(x), errors[-1], sums, floor)


def fire(activations: Tensor, floor: Callable[[Tensor], Tensor] | None, scratch: Tensor) -> Tensor:
    """Makes activations codes, in place: those that do not exceed the floor become 0. Returns the mean floor."""
    if floor is None:
        activations.relu_()
        return activations.new_zeros(())
    least = floor(activations)
    # A product, since what is not a number has to reach the loss.
    activations.mul_(torch.gt(activations, least, out=scratch))
    return least.mean()


def revive(model: Autoencoder, x: Tensor, error: Tensor, dead: Tensor, most: int, weight: float) -> Tensor:
    """Adds the gradients of the auxiliary loss on dead latents to the parameters (Gao et al. 2024, section A.2).

    The ``most`` strongest of the ``dead`` latents ``[D]`` are to rebuild what the others leave of a vector: the
    loss is ``weight / 2 |e - e'|^2``, mean over the batch, without a gradient through e.
    """
    with torch.enable_grad():
        encoder = model.W_e.index_select(0, dead)
        activations = torch.addmm(model.b_e[dead] - encoder @ model.b_d, x, encoder.T)
        floor = next_largest(activations.detach(), min(most, len(dead)))
        codes = activations.where(activations > floor, 0.0)
        missed = torch.addmm(error, codes, model.W_d.index_select(0, dead))
        loss = weight * missed.square().sum() / (2 * len(x))
        loss.backward()
    return loss.detach()
