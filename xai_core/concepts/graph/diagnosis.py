"""What the concept graph is asked when a decision is wrong: an attack, two graphs side by side (iERF, VI-E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.batching import run_batches
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph.concept_graph import build, check_request
from xai_core.concepts.graph.decomposition import NO_CONCEPT
from xai_core.concepts.graph.nodes import Importance, Nodes, among_the_best, top_concepts
from xai_core.concepts.graph.options import GraphOptions
from xai_core.concepts.graph.structure import ConceptGraph
from xai_core.errors import UsageError
from xai_core.metrics.robustness.attack import allowed
from xai_core.models import Classifier


def fgsm(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 8.0,
    targeted: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015; iERF, section VI-E2): one step of the sign.

    Args:
        images: normalised ``[B, 3, H, W]``; targets: classes ``[B]`` to be reached, or to be left where not
            ``targeted``.
        epsilon: the change of every channel, of 255, as far as the image stays a picture.

    Returns:
        ``[B, 3, H, W]`` in the images' type; pixels without a slope stay.

    Raises:
        UsageError: epsilon is not positive, or the targets are not ``[B]`` classes of the model.
    """
    if not 0 < epsilon <= 255:
        raise UsageError(f"epsilon: expected more than 0 and at most 255, got {epsilon}")
    if targets.shape != images.shape[:1] or not bool(((targets >= 0) & (targets < model.num_classes)).all()):
        raise UsageError(
            f"targets: expected a class below {model.num_classes} for each of {len(images)} images, got "
            f"{tuple(targets.shape)}"
        )
    direction = -1.0 if targeted else 1.0

    def moved(rows: slice) -> Tensor:
        leaves = images[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(leaves), targets[rows], reduction="sum")
        (slope,) = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            lowest, highest = allowed(model, leaves.detach(), epsilon)
            sign = direction * slope.sign()
            return torch.where(sign > 0, highest, torch.where(sign < 0, lowest, leaves.detach()))

    return torch.cat(run_batches(moved, len(images), batch_size))


@dataclass(frozen=True)
class Comparison:
    """The graphs of images before and after a change, on the same nodes: the union of both sides' top concepts.

    ``appeared``, ``vanished`` by layer, bool ``[B, N]``: concepts that are among the most important ones of some
    class only after, or only before.
    """

    before: ConceptGraph
    after: ConceptGraph
    appeared: Mapping[str, Tensor]
    vanished: Mapping[str, Tensor]

    def changes(self, layer: str) -> Nodes:
        """After less before: of the importance ``[B, N, M]`` and of the coefficients ``[B, N]``."""
        before, after = self.before.nodes[layer], self.after.nodes[layer]
        return Nodes(
            before.concepts, after.importance - before.importance, after.coefficients - before.coefficients
        )


def compare(
    model: Classifier,
    before: Tensor,
    after: Tensor,
    classes: Tensor,
    layers: Sequence[str],
    dictionaries: Mapping[str, Dictionary],
    *,
    options: GraphOptions | None = None,
    batch_size: int = 32,
) -> Comparison:
    """Which concepts a change of images brings up, and which it takes away (iERF, section VI-E2).

    Args:
        before, after: ``[B, 3, H, W]``, as of an attack; classes: ``[B, M]``, explained on both sides.

    Raises:
        UsageError: pictures of different shapes; else as for
            :func:`~xai_core.concepts.graph.concept_graph.concept_graph`.
    """
    if before.shape != after.shape:
        raise UsageError(
            f"compare: expected images of one shape before and after, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    options = options or GraphOptions()
    check_request(model, before, classes, layers, dictionaries, options)
    both = torch.stack([before, after.to(before)], dim=1).flatten(0, 1)
    graph = build(
        model,
        both,
        classes.repeat_interleave(2, dim=0),
        layers,
        dictionaries,
        options,
        batch_size,
        select=_united,
        together=2,
    )
    sides = graph.map(lambda tensor: tensor[0::2]), graph.map(lambda tensor: tensor[1::2])
    best = [{layer: _best(side.nodes[layer], options.concepts) for layer in layers} for side in sides]
    return Comparison(
        *sides,
        appeared={layer: best[1][layer] & ~best[0][layer] for layer in layers},
        vanished={layer: best[0][layer] & ~best[1][layer] for layer in layers},
    )


def _best(nodes: Nodes, count: int) -> Tensor:
    return among_the_best(nodes.importance, nodes.there, count)


def _united(found: Importance, count: int) -> Tensor:
    """The same concepts for both images of a pair: the top ones of the first, then what the second adds."""
    top = top_concepts(found, count)
    first, second = top[0::2], top[1::2]
    known = (second.unsqueeze(2) == first.unsqueeze(1)).any(dim=2)
    union = torch.cat([first, second.masked_fill(known, NO_CONCEPT)], dim=1)
    missing_last = (union == NO_CONCEPT).int().argsort(dim=1, stable=True)
    return union.gather(1, missing_last).repeat_interleave(2, dim=0)
