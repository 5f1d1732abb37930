"""Networks with dictionaries, and the sub-networks between their layers built by hand: for the tests of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.xai_core.tiny import pictures, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.concepts import Dictionary
from xai_core.concepts.graph import Alignment, Logits, decompose
from xai_core.concepts.vectors import to_vectors
from xai_core.layers import captured
from xai_core.models import Classifier
from xai_core.replay import network_between

ATOMS = 9
IMAGES = 3


@dataclass(frozen=True)
class Case:
    """Two neighbouring layers: ``between`` and ``behind`` are the network by hand, on vectors ``[P, C]``."""

    model: Classifier
    layers: tuple[str, str]
    dictionaries: Mapping[str, Dictionary]
    between: Callable[[Tensor], Tensor]
    behind: Callable[[Tensor], Tensor]


@cache
def case(name: str) -> Case:
    """A convolutional network (smooth: ``cnn``, piecewise linear: ``relu``) or a transformer (``vit``)."""
    if name == "vit":
        model = tiny_vit()
        net = model.module
        layers = ("blocks.0", "blocks.1")
        return Case(
            model,
            layers,
            _dictionaries(model, layers),
            lambda x: net.blocks[1](x[None])[0],
            lambda x: net.forward_head(net.norm(net.blocks[1](x[None])))[0],
        )
    model = {"cnn": tiny_cnn, "relu": tiny_relu_cnn}[name]()
    net = model.module
    layers = ("layer1", "layer2")

    def as_map(x: Tensor) -> Tensor:
        side = int(len(x) ** 0.5)
        return x.T.reshape(1, -1, side, side)

    return Case(
        model,
        layers,
        _dictionaries(model, layers),
        lambda x: net.layer2(as_map(x))[0].flatten(1).T,
        lambda x: net.forward_head(net.layer4(net.layer3(net.layer2(as_map(x)))))[0],
    )


def _dictionaries(model: Classifier, layers: tuple[str, str]) -> dict[str, Dictionary]:
    """An autoencoder with an offset for the first layer, plain atoms with LASSO codes for the second."""
    images, _ = pictures(8)
    with torch.no_grad(), captured(model, layers) as outputs:
        model(images)
    first, second = (to_vectors(model, outputs[layer], layer).flatten(0, 1).float() for layer in layers)
    generator = torch.Generator().manual_seed(2)
    pick = torch.randperm(len(first), generator=generator)[:ATOMS]
    others = second[torch.randperm(len(second), generator=generator)[:ATOMS]]
    offset = first.mean(dim=0) / 2
    weight = torch.nn.functional.normalize(first[pick] - offset, dim=1)
    bias = -(weight @ offset)
    encoder = {"weight": weight, "bias": bias, "offset": offset, "scale": torch.tensor(1.0)}
    return {
        layers[0]: Dictionary(weight, torch.ones(ATOMS, dtype=torch.long), encoder, "sae"),
        layers[1]: Dictionary(others, torch.ones(len(others), dtype=torch.long)),
    }


def alignment(one: Case, concepts: Tensor, images: Tensor | None = None) -> Alignment:
    """The alignment score of concepts of the second layer."""
    images = pictures(IMAGES)[0] if images is None else images
    first, second = one.layers
    with torch.no_grad():
        between = network_between(one.model, images, first, second)
    source = decompose(one.model, between.activation, first, one.dictionaries[first])
    target = decompose(one.model, between.reached, second, one.dictionaries[second])
    return Alignment(one.model, source, between, target, concepts)


def logits(one: Case, classes: Tensor) -> Logits:
    """Logits of classes, behind the first layer."""
    with torch.no_grad():
        between = network_between(one.model, pictures(IMAGES)[0], one.layers[0], None)
    source = decompose(one.model, between.activation, one.layers[0], one.dictionaries[one.layers[0]])
    return Logits(one.model, source, between, classes)


def by_hand(one: Case, question: Alignment, image: int, target: int) -> Callable[[Tensor], Tensor]:
    """S_ab of codes ``[P, K]``, position by position from equation 13, through the network built by hand."""
    source, child = question.source, question.target
    concept = int(question.concepts[image, target])

    def score(codes: Tensor) -> Tensor:
        reached = one.between(codes @ source.atoms + source.offset)
        atom = child.atoms[concept]
        total = codes.new_zeros(())
        for place, vector in enumerate(reached):
            cosine = torch.dot(vector, atom) / (vector.norm() * atom.norm())
            total = total + child.codes[image, place, concept] * cosine
        return total

    return score
