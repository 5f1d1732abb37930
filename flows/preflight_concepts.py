"""Concept graphs and latents: what cannot be made of a model is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from tasks.concept_config import ConceptsConfig
from tasks.config import options_of
from xai_core.concepts.dictionary import Dictionary
from xai_core.concepts.graph import concept_graph, interlayer_curves
from xai_core.concepts.pfv import has_class_token
from xai_core.concepts.sae.variants import VARIANTS
from xai_core.concepts.vectors import to_vectors
from xai_core.errors import UsageError
from xai_core.layers import captured
from xai_core.models import Classifier
from xai_core.per_model import probe_image
from xai_core.receptive_fields.attributors import attributors, choose

# Atoms of the dictionaries that a model is probed with.
ATOMS = 2


def check_graph(model: Classifier, concepts: ConceptsConfig) -> None:
    """Makes a graph of one picture of noise by tiny dictionaries, with every attribution that the study asks for.

    Raises:
        UsageError: layers out of order, or an attribution that is not defined on the network between them.
    """
    graph = concepts.graph_or_default
    image = probe_image(model).detach()
    dictionaries = _tiny(model, image, concepts.layers)
    classes = torch.zeros(1, 1, dtype=torch.int64, device=image.device)
    concept_graph(model, image, classes, concepts.layers, dictionaries, options=graph.options())
    if graph.compare and len(concepts.layers) < 2:
        raise UsageError("compare: edges are tested between layers: name two under concepts.layers, or none here")
    for source, target in pairwise(concepts.layers):
        if graph.compare:
            compared = {choice.name: choice.options for choice in graph.compare}
            interlayer_curves(model, image, source, target, dictionaries, compared, targets=1, steps=1)


def check_cafe(model: Classifier, concepts: ConceptsConfig) -> None:
    """Checks that there are latents, and that what explains them fits the model and its layers.

    Raises:
        UsageError: naming what to change.
    """
    cafe = concepts.cafe_or_default
    if not any(choice.name in VARIANTS for choice in concepts.extractors):
        raise UsageError(
            f"expected an extractor with latents ({', '.join(VARIANTS)}), got "
            f"{', '.join(choice.id for choice in concepts.extractors)}; add one, or remove cafe"
        )
    for choice in cafe.attributors:
        choose(model, choice.name, options_of(attributors, choice))
    if cafe.pooling == "class_token":
        for layer in concepts.layers:
            with torch.no_grad(), captured(model, [layer]) as outputs:
                model(probe_image(model))
            if not has_class_token(model, outputs[layer]):
                raise UsageError(f"pooling: expected a layer with a class token, got {layer}; use max or sum")


def _tiny(model: Classifier, image: torch.Tensor, layers: Sequence[str]) -> dict[str, Dictionary]:
    """Two vectors of each layer itself, so that its codes are not all zero."""
    with torch.no_grad(), captured(model, layers) as outputs:
        model(image)
    found = {}
    for layer in layers:
        vectors = to_vectors(model, outputs[layer], layer)[0]
        longest = vectors.norm(dim=1).topk(ATOMS).indices
        found[layer] = Dictionary(atoms=vectors[longest].float(), sizes=torch.ones(ATOMS, dtype=torch.int64))
    return found
