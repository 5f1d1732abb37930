"""A method's maps with a graph that leads back to the images, on a network whose kinks may be rounded off."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attention import explicit_attention
from xai_core.attribution.explainer import Explainer
from xai_core.attribution.gradients.interception import Interception
from xai_core.attribution.interface import MapsWithArrays, upsample_map
from xai_core.models import Classifier
from xai_core.precision import own_modes

# A rectifier from the softplus that stands for a ReLU, its input and its own arguments.
Ramp = Callable[[Tensor], Tensor]
SOFTENED: dict[str, Callable[..., Tensor]] = {
    "relu": lambda ramp, x: ramp(x),
    "relu6": lambda ramp, x: _between(ramp, x, 0.0, 6.0),
    "hardtanh": lambda ramp, x, min_val=-1.0, max_val=1.0: _between(ramp, x, min_val, max_val),
    "leaky_relu": lambda ramp, x, negative_slope=0.01: negative_slope * x + (1 - negative_slope) * ramp(x),
}


def _between(ramp: Ramp, x: Tensor, low: float, high: float) -> Tensor:
    return low + ramp(x - low) - ramp(x - high)


def softened(beta: float) -> Interception:
    """Networks inside the block compute softplus(x) = log(1 + exp(beta x)) / beta instead of ReLU.

    (Dombrowski et al. 2019, section 2.) ReLU6, hard tanh and leaky ReLU are sums of shifted ReLUs and follow. The
    calls are changed on their way, in this thread alone: the network itself is not touched.
    """

    def rule(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def soft(_function: object, values: Tensor, *rest: Any, inplace: bool = False, **named: Any) -> Tensor:
            return make(lambda x: F.softplus(x, beta), values, *rest, **named)

        return soft

    return Interception({name: rule(make) for name, make in SOFTENED.items()})


class NoSecondDerivative(RuntimeError):  # noqa: N818
    """A network computes something whose derivative torch cannot differentiate."""


@contextmanager
def second_derivatives(model: Classifier, softplus_beta: float | None = None) -> Iterator[None]:
    """A block in which the network's passes can be differentiated twice; it is left as it was, also by an error.

    Args:
        softplus_beta: see :func:`softened`; None leaves ReLUs, whose second derivative is 0.

    Raises:
        NoSecondDerivative: where the block differentiates what torch cannot.
    """
    with own_modes("fp32", model.device), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(explicit_attention(model.module))
        if softplus_beta is not None:
            stack.enter_context(softened(softplus_beta))
        try:
            yield
        except RuntimeError as error:
            if re.match(r"derivative for .* is not implemented", str(error)):
                raise NoSecondDerivative(str(error)) from error
            raise


def differentiable_maps(explainer: Explainer, model: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Maps ``[B, H, W]`` of the targets ``[B]``, with a graph that leads back to images that require gradients.

    Where nothing softens the network their numbers are those of :meth:`Explainer.maps`, in the model's type. To be
    called within :func:`second_derivatives`, with a method that is ``differentiable``.
    """
    entry = explainer.entry
    options = explainer.chosen
    found = entry.function(model, images, targets.view(-1, 1), options, explainer.batch_size)
    maps = found.maps if isinstance(found, MapsWithArrays) else found
    return upsample_map(maps.squeeze(1), images.shape[-2:], entry.upsampling)
