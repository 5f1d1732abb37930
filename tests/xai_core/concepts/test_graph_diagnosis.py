"""Diagnosis by the concept graph: the attack, graphs side by side, and the routes of classes."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.graphs import IMAGES, case
from tests.xai_core.tiny import CLASSES, pictures, tiny_cnn
from xai_core.concepts.graph import (
    CLASSIFIER,
    NO_CONCEPT,
    ConceptGraph,
    GraphOptions,
    Nodes,
    compare,
    concept_graph,
    fgsm,
    strongest_routes,
)
from xai_core.errors import UsageError
from xai_core.models import Classifier


def _pictures(model: Classifier) -> Tensor:
    """Real pictures: values between black and white."""
    light = torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return model.normalise(light)


@pytest.mark.parametrize("targeted", [True, False])
def test_fgsm_is_one_step_of_the_sign_within_the_picture(targeted: bool) -> None:
    model = tiny_cnn()
    images, targets = _pictures(model), torch.tensor([3, 1, 0])
    found = fgsm(model, images, targets, epsilon=4.0, targeted=targeted, batch_size=2)
    leaf = images.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model(leaf), targets)
    (slope,) = torch.autograd.grad(loss, leaf)
    std = torch.tensor(model.data_config["std"], dtype=torch.float64).view(1, 3, 1, 1)
    moved = images + (-1 if targeted else 1) * slope.sign() * 4 / 255 / std
    black, white = (model.normalise(torch.full_like(images, value)) for value in (0.0, 1.0))
    torch.testing.assert_close(found, moved.clamp(min=black, max=white), rtol=0, atol=1e-6)
    with torch.no_grad():
        before, after = (model(one).log_softmax(dim=1).gather(1, targets[:, None]) for one in (images, found))
    assert ((after > before) == targeted).all()


def test_fgsm_refuses_what_is_no_attack() -> None:
    model, images = tiny_cnn(), pictures(2)[0]
    with pytest.raises(UsageError, match="epsilon: expected more than 0"):
        fgsm(model, images, torch.tensor([0, 1]), epsilon=0)
    with pytest.raises(UsageError, match="targets: expected a class below 5 for each of 2 images"):
        fgsm(model, images, torch.tensor([0, 5]))


@pytest.mark.parametrize("name", ["vit", "relu"])
def test_comparison_has_both_graphs_on_the_union_of_their_nodes(name: str) -> None:
    one = case(name)
    images, _ = pictures(IMAGES)
    classes = torch.tensor([[0, 1], [2, 3], [4, 0]])
    attacked = fgsm(one.model, images, classes[:, 1], epsilon=60.0)
    options = GraphOptions(concepts=2)
    found = compare(one.model, images, attacked, classes, one.layers, one.dictionaries, options=options)
    small = compare(
        one.model, images, attacked, classes, one.layers, one.dictionaries, options=options, batch_size=1
    )
    alone = [
        concept_graph(one.model, side, classes, one.layers, one.dictionaries, options=options)
        for side in (images, attacked)
    ]
    for layer in one.layers:
        nodes = found.before.nodes[layer].concepts
        assert torch.equal(nodes, found.after.nodes[layer].concepts)
        assert torch.equal(nodes, small.before.nodes[layer].concepts)
        for image in range(IMAGES):
            first, second = ({*graph.nodes[layer].concepts[image].tolist()} - {NO_CONCEPT} for graph in alone)
            shown = [concept for concept in nodes[image].tolist() if concept != NO_CONCEPT]
            assert len(shown) == len({*shown}) and {*shown} == first | second
            assert {*nodes[image][found.appeared[layer][image]].tolist()} == second - first
            assert {*nodes[image][found.vanished[layer][image]].tolist()} == first - second
            for graph, side in zip(alone, (found.before, found.after), strict=True):
                for place, concept in enumerate(graph.nodes[layer].concepts[image].tolist()):
                    if concept != NO_CONCEPT:
                        same = shown.index(concept)
                        torch.testing.assert_close(
                            side.nodes[layer].importance[image, same],
                            graph.nodes[layer].importance[image, place],
                        )
        change = found.changes(layer)
        torch.testing.assert_close(
            change.coefficients,
            found.after.nodes[layer].coefficients - found.before.nodes[layer].coefficients,
            equal_nan=True,
        )
        torch.testing.assert_close(found.appeared[layer], small.appeared[layer])
    pair = found.before.pairs[0]
    torch.testing.assert_close(found.after.edges[pair], small.after.edges[pair], equal_nan=True)
    assert any(found.appeared[layer].any() for layer in one.layers), "an attack of this size changes something"


def test_a_picture_compared_with_itself_has_no_change() -> None:
    one = case("cnn")
    images, targets = pictures(IMAGES)
    found = compare(one.model, images, images, targets[:, None], one.layers, one.dictionaries)
    for layer in one.layers:
        assert not found.appeared[layer].any() and not found.vanished[layer].any()
        assert found.changes(layer).importance.nan_to_num().abs().max() < 1e-12
    with pytest.raises(UsageError, match="compare: expected images of one shape"):
        compare(one.model, images, images[:1], targets[:, None], one.layers, one.dictionaries)


def _random_graph(images: int = 6, nodes: int = 4, classes: int = 2) -> ConceptGraph:
    generator = torch.Generator().manual_seed(3)
    layers = ("a", "b", "c")
    concepts = {layer: torch.rand(images, 9, generator=generator).argsort(dim=1)[:, :nodes] for layer in layers}
    concepts["b"][0, 2:] = NO_CONCEPT
    widths = dict.fromkeys(layers, nodes) | {CLASSIFIER: classes}
    edges = {
        (a, b): torch.randn(images, widths[a], widths[b], generator=generator)
        for a, b in (("a", "b"), ("b", "c"), ("c", CLASSIFIER))
    }
    edges["a", "b"][0, :, 2:] = torch.nan
    edges["b", "c"][0, 2:] = torch.nan
    edges["c", CLASSIFIER][1, :, 0] = -1.0
    shown = {
        layer: Nodes(one, torch.zeros(images, nodes, classes), torch.ones(images, nodes))
        for layer, one in concepts.items()
    }
    return ConceptGraph(torch.arange(classes).expand(images, -1) % CLASSES, layers, shown, edges)


@pytest.mark.parametrize("strength", ["product", "bottleneck"])
def test_strongest_routes_are_the_best_of_all_paths(strength: str) -> None:
    graph = _random_graph()
    found = strongest_routes(graph, strength)
    join = {"product": prod, "bottleneck": min}[strength]
    for image in range(6):
        shares = []
        for pair in graph.pairs:
            weights = graph.edges[pair][image].nan_to_num(0.0).clamp(min=0)
            shares.append(weights / weights.max() if weights.any() else weights)
        for label in range(2):
            best = max(
                (join((*(float(shares[step][path[step], path[step + 1]]) for step in range(2)), last)), path)
                for path in product(range(4), repeat=3)
                for last in [float(shares[2][path[2], label])]
            )
            assert float(found.strength[image, label]) == pytest.approx(best[0])
            places = found.places[image, label].tolist()
            if best[0] == 0:
                assert places == [-1, -1, -1] == found.concepts[image, label].tolist()
                continue
            steps = [float(shares[step][places[step], places[step + 1]]) for step in range(2)]
            assert join((*steps, float(shares[2][places[2], label]))) == pytest.approx(best[0])
            of_layers = zip(graph.layers, places, strict=True)
            expected = [int(graph.nodes[layer].concepts[image, place]) for layer, place in of_layers]
            assert found.concepts[image, label].tolist() == expected
    assert found.strength[1, 0] == 0, "a class that everything speaks against has no route"


def test_an_unknown_strength_is_refused() -> None:
    with pytest.raises(UsageError, match="strength: expected one of product, bottleneck, got 'sum'"):
        strongest_routes(_random_graph(), "sum")  # type: ignore[arg-type]
