"""DeepLIFT with the Rescale rule, as multipliers put in the place of derivatives.

A first pass of the reference picture records what enters each nonlinearity; the pass of the images then computes
the multipliers on the spot. The reference is one picture for all images: it costs one forward a batch, and the
backward passes are those of a plain gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.gradients.interception import ELEMENTWISE_FUNCTIONS, Interception, Rule, slope, unary
from xai_core.attribution.gradients.operations import (
    listed,
    nonlinear_operations,
    operations_of,
)
from xai_core.baselines import Baseline, make_baseline
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.per_model import once_per_model, probe_image
from xai_core.registry import methods


@dataclass(frozen=True)
class DeepLiftOptions:
    """``baseline``: the reference picture: ``black`` (zero light) or ``mean`` (zero after normalisation)."""

    baseline: Literal["black", "mean"] = "black"

    def __post_init__(self) -> None:
        if self.baseline not in ("black", "mean"):
            raise UsageError(f"deep_lift.baseline: expected black or mean, got {self.baseline!r}")


class _Multiplied(torch.autograd.Function):
    """A value whose derivative is a given multiplier."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, output: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, later: Tensor) -> tuple[Tensor, None, None]:
        (multiplier,) = ctx.saved_tensors
        return later * multiplier, None, None


class _MaxPooled(torch.autograd.Function):
    """Max pooling: a window's rise is given to the image's largest element, its fall to the reference's."""

    @staticmethod
    def forward(
        ctx: Any,
        difference: Tensor,
        output: Tensor,
        winners: Tensor,
        change: Tensor,
        lost: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(difference, winners, change, lost)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, later: Tensor) -> tuple[Tensor, None, None, None, None]:
        difference, winners, change, lost = ctx.saved_tensors
        plane = torch.zeros_like(difference, dtype=later.dtype).flatten(2)
        later, change = later.flatten(2), change.flatten(2)
        # scatter_add: overlapping windows can have one winner.
        given = plane.scatter_add(2, winners.flatten(2), later * change.clamp(min=0))
        given.scatter_add_(2, lost.flatten(2), later * change.clamp(max=0))
        plain = plane.scatter_add_(2, winners.flatten(2), later)
        flat = difference.flatten(2)
        multiplied = torch.where(flat == 0, plain, given / flat)
        return multiplied.view_as(difference), None, None, None, None


def reference_record(model: Classifier, reference: Tensor) -> list[Tensor]:
    """What enters each nonlinearity, in order of the calls, when the network sees ``[1, 3, H, W]``."""
    record: list[Tensor] = []

    def kept(function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        record.append(values.detach().clone())
        return unary(function, rest, named)(values)

    with torch.no_grad(), Interception(dict.fromkeys((*ELEMENTWISE_FUNCTIONS, "max_pool2d"), kept)):
        model(reference)
    return record


def multiplier_logits(model: Classifier, leaves: Tensor, record: list[Tensor]) -> Tensor:
    """Logits of the images whose derivatives are DeepLIFT's multipliers against the recorded reference.

    Args:
        leaves: ``[B, 3, H, W]``, requiring gradients; record: see :func:`reference_record`.
    """
    references = iter(record)
    rules: dict[str, Rule] = dict.fromkeys(ELEMENTWISE_FUNCTIONS, partial(_rescaled, references))
    with torch.enable_grad(), Interception({**rules, "max_pool2d": partial(_pooled, references)}):
        return model(leaves)


def _rescaled(references: Iterator[Tensor], function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
    """The Rescale rule (section 3.5.2): change of output over change of input, the derivative where that is 0."""
    reference = next(references)
    apply = unary(function, rest, named)
    with torch.no_grad():
        inner = values.detach()
        output = apply(inner)
        change = inner - reference
        # Below this the quotient is rounding: it keeps half of the digits, and the derivative between is as good.
        least = torch.finfo(change.dtype).eps ** 0.5 * torch.maximum(inner.abs(), reference.abs())
        quotient = (output - apply(reference)) / change
    multiplier = torch.where(change.abs() <= least, slope(apply, (inner + reference) / 2), quotient)
    return _Multiplied.apply(values, output, multiplier)


def _pooled(references: Iterator[Tensor], _function: Rule, values: Tensor, *rest: Any, **named: Any) -> Tensor:
    reference = next(references)
    named.pop("return_indices", None)
    with torch.no_grad():
        output, winners = F.max_pool2d_with_indices(values.detach(), *rest, **named)
        before, lost = F.max_pool2d_with_indices(reference, *rest, **named)
    return _MaxPooled.apply(values - reference, output, winners, output - before, lost.expand_as(winners))


@once_per_model
def _outside_the_rule(model: Classifier) -> str | None:
    image = probe_image(model)
    record = reference_record(model, torch.zeros_like(image.detach()))
    try:
        logits = multiplier_logits(model, image, record)
    except RuntimeError:
        return listed(operations_of(model) - {"ReLU"})
    others = nonlinear_operations(logits) - {"_Multiplied", "_MaxPooled"}
    if others:
        return listed(others)
    exact = model(image)
    same = (logits - exact).abs().max() <= 1e-4 * exact.abs().max()
    return None if same else "activations in place whose result is not used"


def affine_and_elementwise(model: Classifier, _options: Any) -> str | None:
    """Layers that are affine, element-wise or max pooling, which the Rescale rule covers."""
    others = _outside_the_rule(model)
    if others is None:
        return None
    return (
        "the Rescale rule covers affine layers, element-wise activations and max pooling, "
        f"and this network has {others}"
    )


@methods.register(
    "deep_lift",
    options=DeepLiftOptions,
    paper="Shrikumar et al. 2017, Learning Important Features Through Propagating Activation Differences",
    equation="1-3, section 3.5.2 (Rescale rule)",
    needs=(affine_and_elementwise,),
    cost="1 forward + 1 input gradient a class, and 1 forward of the reference a batch",
    half_precision=False,
)
def deep_lift(
    model: Classifier, images: Tensor, classes: Tensor, options: DeepLiftOptions, batch_size: int
) -> Tensor:
    """DeepLIFT, Rescale rule: contributions to the logit's change from a reference, summed over the channels."""
    reference = make_baseline(Baseline(options.baseline), model, images[:1])
    record = reference_record(model, reference)
    leaves = images.detach().requires_grad_(True)
    logits = multiplier_logits(model, leaves, record)
    change = images - reference
    return per_class(logits, classes, [leaves], lambda multipliers: (multipliers[0] * change).sum(dim=1))
