"""Layer-wise relevance propagation on convolutional networks, by zennit's rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from xai_core.attribution.gradients.second_order import linked, plain_calls
from xai_core.attribution.propagation.gradient_form import Held
from xai_core.attribution.propagation.hooks import Hold, numbers, propagation_rules
from xai_core.attribution.propagation.layers import dense_convolutions
from xai_core.attribution.propagation.structure import StructureCheck, zennit_installed
from xai_core.errors import UsageError
from xai_core.layers import per_class
from xai_core.models import Classifier
from xai_core.registry import NoOptions, methods

Composite = Literal["epsilon", "z_plus", "epsilon_plus"]


@dataclass(frozen=True)
class EpsilonOptions:
    """``epsilon``: what is added to every denominator of the epsilon rule, with its sign (zennit's default)."""

    epsilon: float = 1e-6
    _method: ClassVar[str] = "lrp_epsilon"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise UsageError(f"{self._method}.epsilon: expected a positive number, got {self.epsilon}")


@dataclass(frozen=True)
class EpsilonPlusOptions(EpsilonOptions):
    """``epsilon``: as in ``lrp_epsilon``, for the fully connected layers."""

    _method: ClassVar[str] = "lrp_epsilon_plus"


@contextmanager
def lrp_rules(
    module: nn.Module, composite: Composite, *, epsilon: float = 1e-6, hold: Hold = numbers
) -> Iterator[None]:
    """Under it the gradients of a convolutional network are relevance divided by activation.

    Args:
        composite: which rule linear layers follow: ``epsilon`` all the epsilon rule, ``z_plus`` all the z+ rule,
            ``epsilon_plus`` convolutions z+ and fully connected layers epsilon. A linear layer that is applied at
            every position of a map is a convolution, however it is written.
        hold: as in :func:`~xai_core.attribution.propagation.hooks.propagation_rules`.
    """
    from zennit.rules import Epsilon, ZPlus

    by_epsilon, by_z_plus = Epsilon(epsilon=epsilon), ZPlus()
    dense = dense_convolutions(module)

    def choose(layer: nn.Module, source: Tensor) -> Any:
        if composite == "epsilon_plus":
            fully_connected = layer in dense or (isinstance(layer, nn.Linear) and source.ndim == 2)
            return by_epsilon if fully_connected else by_z_plus
        return by_epsilon if composite == "epsilon" else by_z_plus

    with propagation_rules(module, choose, hold=hold):
        yield


_structure = StructureCheck(lambda module: lrp_rules(module, "epsilon"), attention=False)


def layers_with_rules(model: Classifier, _options: Any) -> str | None:
    """Only layers with a rule: convolutions, norms, activations, pooling, sums, sigmoid gates; no attention."""
    foreign = _structure.foreign(model)
    if not foreign:
        return None
    return f"outside of layers that have a rule it computes {', '.join(foreign)}"


def relevance_maps(
    model: Classifier, images: Tensor, classes: Tensor, rules: AbstractContextManager[None]
) -> Tensor:
    """Relevance of the pixels for each class's logit under rules: sums over channels ``[B, K, H, W]``."""
    pixels = images.detach().requires_grad_(True)
    with torch.enable_grad(), rules:
        logits = model(pixels)
    return per_class(
        logits,
        classes,
        [pixels],
        lambda gradients: (gradients[0] * images).sum(dim=1),
        create_graph=images.requires_grad,
    )


def _lrp(
    model: Classifier, images: Tensor, classes: Tensor, composite: Composite, epsilon: float = 1e-6
) -> Tensor:
    """Relevance maps; images that require gradients are differentiated through."""
    rules = partial(lrp_rules, model.module, composite, epsilon=epsilon)
    if not images.requires_grad:
        return relevance_maps(model, images, classes, rules())
    # The rules' constants, from a pass without rules: a graph of relevances does not give their derivatives.
    held: list[Held] = []
    with torch.enable_grad(), rules(hold=lambda source, output: held.append(Held(source, output))):
        curved = plain_calls(model, images)
    ordered = iter(held)
    with linked(curved):
        return relevance_maps(model, images, classes, rules(hold=lambda _source, _output: next(ordered)))


@methods.register(
    "lrp_epsilon",
    options=EpsilonOptions,
    paper="Bach et al. 2015, On pixel-wise explanations for non-linear classifier decisions by LRP",
    equation="58",
    families=("cnn",),
    needs=(zennit_installed, layers_with_rules),
    cost="1 forward; for each class about 2 more",
    # Pearson with fp32 on a trained MobileNetV2: 0.90 (z+ and epsilon-plus: 0.9997).
    half_precision=False,
    differentiable=True,
)
def lrp_epsilon(
    model: Classifier, images: Tensor, classes: Tensor, options: EpsilonOptions, batch_size: int
) -> Tensor:
    """LRP-epsilon: relevance of the class logit, shared in proportion to signed contributions."""
    return _lrp(model, images, classes, "epsilon", options.epsilon)


@methods.register(
    "lrp_z_plus",
    paper="Montavon et al. 2017, Explaining nonlinear classification decisions with deep Taylor decomposition",
    equation="z+ rule",
    families=("cnn",),
    needs=(zennit_installed, layers_with_rules),
    cost="1 forward; for each class about 4 more",
    differentiable=True,
)
def lrp_z_plus(model: Classifier, images: Tensor, classes: Tensor, options: NoOptions, batch_size: int) -> Tensor:
    """LRP-z+: relevance of the class logit, shared among positive contributions only, in every layer."""
    return _lrp(model, images, classes, "z_plus")


@methods.register(
    "lrp_epsilon_plus",
    options=EpsilonPlusOptions,
    paper="Kohlbrenner et al. 2020, Towards best practice in explaining neural network decisions with LRP",
    equation="composite without a special first layer",
    families=("cnn",),
    needs=(zennit_installed, layers_with_rules),
    cost="1 forward; for each class about 4 more",
    differentiable=True,
)
def lrp_epsilon_plus(
    model: Classifier, images: Tensor, classes: Tensor, options: EpsilonPlusOptions, batch_size: int
) -> Tensor:
    """LRP composite epsilon-plus: z+ in convolutions, epsilon in fully connected layers (zennit's EpsilonPlus)."""
    return _lrp(model, images, classes, "epsilon_plus", options.epsilon)
