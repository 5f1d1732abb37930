"""SRD: sharing ratio decomposition, from feature vectors down to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.arithmetic import wide
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
)
def srd(model: Classifier, images: Tensor, classes: Tensor, options: SrdOptions, batch_size: int) -> Tensor:
    """SRD: relevance of feature vectors, shared among those before them by how far they point the same way."""
    layer = stage_layer(model, 8) if options.scale == "high" else None
    with ExitStack() as stack:
        if options.scale != "low":
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sharing_ratio_rules(model.module))
        if layer is None:
            reached = images.detach().requires_grad_(options.scale == "input")
            features = model.module.forward_features(reached)
        else:
            outputs = stack.enter_context(captured(model, [layer], with_gradient=True))
            features = model.module.forward_features(images)
            reached = outputs[layer]
        vectors = as_map(model, features, "forward_features")
    starts = list(_starts(model, features, classes, STARTS[options.start]))
    if options.scale == "low":
        return torch.stack(starts, dim=1)
    maps = []
    for position, relevance in enumerate(starts):
        gradient = start_at(vectors.detach(), relevance).to(vectors.dtype)
        more = position < len(starts) - 1
        (shared,) = torch.autograd.grad(vectors, reached, gradient, retain_graph=more)
        found = wide(reached.detach()) * wide(shared)
        maps.append((found if layer is None else as_map(model, found, layer)).sum(dim=1))
    return torch.stack(maps, dim=1)


def _starts(
    model: Classifier, features: Tensor, classes: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Tensor]:
    """Relevance ``[B, h, w]`` of the last feature vectors for each class (equations 5-6)."""
    with torch.enable_grad():
        leaf = features.detach().requires_grad_(True)
        logits = model.module.forward_head(leaf)
        scalars = [logits.mean(dim=1).sum(), *(logits.gather(1, one.view(-1, 1)).sum() for one in classes.T)]
    vectors = wide(as_map(model, leaf.detach(), "forward_features"))
    scores = []
    for position, scalar in enumerate(scalars):
        (gradient,) = torch.autograd.grad(scalar, leaf, retain_graph=position < len(scalars) - 1)
        weights = wide(as_map(model, gradient, "forward_features")).mean(dim=(2, 3), keepdim=True)
        scores.append((vectors * weights).sum(dim=1))
    for score in scores[1:]:
        yield combine(score, scores[0])
