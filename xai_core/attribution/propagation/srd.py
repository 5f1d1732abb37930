"""SRD: sharing ratio decomposition, from feature vectors down to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.gradients.second_order import graph_start
from xai_core.attribution.propagation.gradient_form import Held
from xai_core.attribution.propagation.sharing_ratio import sharing_ratio_rules, start_at
from xai_core.attribution.propagation.structure import AFFINE, StructureCheck
from xai_core.errors import UsageError
from xai_core.layers import as_map, captured, stage_layer
from xai_core.models import Classifier
from xai_core.registry import methods

Scale = Literal["input", "high", "low"]
Start = Literal["clamped_mean", "mean", "raw"]


@dataclass(frozen=True)
class SrdOptions:
    """``scale`` of the map: ``input`` pixels, ``high`` the last features at an eighth of the input's side, ``low``
    the last features of all. ``start``: what a feature vector of the last layer contributes to a class (table IV),
    ``raw`` equation 6, ``mean`` less its mean over classes, ``clamped_mean`` the positive part (equation 5).
    """

    scale: Scale = "input"
    start: Start = "clamped_mean"

    def __post_init__(self) -> None:
        for name, choices in (("scale", ("input", "high", "low")), ("start", tuple(STARTS))):
            if getattr(self, name) not in choices:
                raise UsageError(f"srd.{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")


#: Relevance of the last feature vectors from their scores for the class and for the mean of all classes.
STARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clamped_mean": lambda score, mean: (score - mean).relu(),
    "mean": lambda score, mean: score - mean,
    "raw": lambda score, mean: score,
}

_structure = StructureCheck(sharing_ratio_rules, attention=False, known=AFFINE)


def affine_between_activations(model: Classifier, _options: SrdOptions) -> str | None:
    """Affine layers, poolings and sums between activations that are modules; norms and gates are constant."""
    foreign = _structure.foreign(model)
    return f"between its activations it computes {', '.join(foreign)}" if foreign else None


def layer_of_scale(model: Classifier, options: SrdOptions) -> str | None:
    """Features at an eighth of the input's side, where the scale is high."""
    if options.scale != "high":
        return None
    try:
        stage_layer(model, 8)
    except UsageError as error:
        return str(error)
    return None


@methods.register(
    "srd",
    options=SrdOptions,
    paper="iERF: Kim et al., sharing ratio decomposition",
    equation="2-6, 17-22",
    families=("cnn",),
    needs=(affine_between_activations, layer_of_scale),
    upsampling="bilinear",
    cost="1 forward; for each class about 2 more (input scale)",
    differentiable=True,
)
def srd(model: Classifier, images: Tensor, classes: Tensor, options: SrdOptions, batch_size: int) -> Tensor:
    """SRD: relevance of feature vectors, shared among those before them by how far they point the same way."""
    layer = stage_layer(model, 8) if options.scale == "high" else None
    if options.scale == "low":
        return torch.stack(list(_starts(model, model.module.forward_features(images), classes, options)), dim=1)
    ruled, numbers = _passes(model, images, layer)
    twice = images.requires_grad
    vectors = wide(as_map(model, numbers.features, "forward_features"))
    starts = list(_starts(model, numbers.features, classes, options))
    start_from = as_map(model, ruled.features, "forward_features")
    maps = []
    for position, relevance in enumerate(starts):
        gradient = start_at(vectors, relevance).to(start_from.dtype)
        more = twice or position < len(starts) - 1
        (shared,) = torch.autograd.grad(start_from, ruled.reached, gradient, retain_graph=more, create_graph=twice)
        found = wide(numbers.reached) * wide(shared)
        maps.append((found if layer is None else as_map(model, found, layer)).sum(dim=1))
    return torch.stack(maps, dim=1)


@dataclass(frozen=True)
class _Pass:
    """The last features of a pass, and what its relevance shall reach: a layer's output, or the images."""

    features: Tensor
    reached: Tensor

    @classmethod
    def of(cls, model: Classifier, images: Tensor, layer: str | None) -> _Pass:
        layers = [] if layer is None else [layer]
        with torch.enable_grad(), captured(model, layers, with_gradient=True) as outputs:
            features = model.module.forward_features(images)
        return cls(features, images if layer is None else outputs[layer])


def _passes(model: Classifier, images: Tensor, layer: str | None) -> tuple[_Pass, _Pass]:
    """A pass under the rules, and the numbers that a map is made of.

    These are the same pass's, without its graph. Where images require gradients they are those of a pass without
    rules, as what the rules hold is: a graph of relevances does not give the derivatives of feature vectors.
    """
    leaf = images.detach().requires_grad_(layer is None)
    if not images.requires_grad:
        with sharing_ratio_rules(model.module):
            ruled = _Pass.of(model, leaf, layer)
        return ruled, _Pass(ruled.features.detach(), ruled.reached.detach())
    held: list[Held] = []
    with sharing_ratio_rules(model.module, lambda source, output: held.append(Held(source, output))):
        plain = _Pass.of(model, images, layer)
    ordered = iter(held)
    with sharing_ratio_rules(model.module, lambda _source, _output: next(ordered)):
        return _Pass.of(model, leaf, layer), plain


def _starts(model: Classifier, features: Tensor, classes: Tensor, options: SrdOptions) -> Iterator[Tensor]:
    """Relevance ``[B, h, w]`` of the last feature vectors for each class (equations 5-6)."""
    twice = features.requires_grad
    with torch.enable_grad():
        begin = graph_start(features)
        logits = model.module.forward_head(begin)
        scalars = [logits.mean(dim=1).sum(), *(logits.gather(1, one.view(-1, 1)).sum() for one in classes.T)]
    vectors = wide(as_map(model, features, "forward_features"))
    scores = []
    for position, scalar in enumerate(scalars):
        more = twice or position < len(scalars) - 1
        (gradient,) = torch.autograd.grad(scalar, begin, retain_graph=more, create_graph=twice)
        weights = wide(as_map(model, gradient, "forward_features")).mean(dim=(2, 3), keepdim=True)
        scores.append((vectors * weights).sum(dim=1))
    for score in scores[1:]:
        yield STARTS[options.start](score, scores[0])
