"""The concept graph: alignment scores and attributions against twins written pair by pair from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import combinations
from math import factorial

import pytest
import torch
from torch import Tensor

from tests.xai_core.concepts.graphs import ATOMS, IMAGES, Case, alignment, by_hand, case, logits
from tests.xai_core.tiny import CLASSES, pictures
from xai_core.attribution.gradients.interception import Interception
from xai_core.attribution.propagation.attn_lrp import attn_lrp_rules
from xai_core.attribution.propagation.lrp import lrp_rules
from xai_core.concepts import Dictionary, reconstruction
from xai_core.concepts.graph import (
    CLASSIFIER,
    NO_CONCEPT,
    Attribution,
    GraphOptions,
    Importance,
    averaged,
    concept_graph,
    decompose,
    edge_shares,
    node_importance,
    top_concepts,
)
from xai_core.concepts.graph.questions import unit
from xai_core.concepts.vectors import to_vectors
from xai_core.errors import NotFinite, UsageError

NAMES = ("cnn", "relu", "vit")
QUERIES = torch.tensor([[4, 0, 7, 2], [1, 3, NO_CONCEPT, 5], [8, 6, 2, 0]])
TARGETS = torch.tensor([[2, 0], [1, 3], [0, 4]])


def pairs() -> list[tuple[int, int, int]]:
    """(image, query, target) of every edge asked about."""
    return [(b, q, t) for b in range(IMAGES) for q in range(QUERIES.shape[1]) for t in range(TARGETS.shape[1])]


def pair_by_pair(
    question: object,
    score_of: Callable[[int, int], Callable[[Tensor], Tensor]],
    places: Tensor,
    weights: Tensor,
    rules: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Coefficients times derivatives: a network rebuilt and run again for each image, query, target and step."""
    codes = question.source.codes  # type: ignore[attr-defined]
    found = torch.zeros(*QUERIES.shape, TARGETS.shape[1], dtype=torch.float64)
    for image, query, target in pairs():
        concept = int(QUERIES[image, query])
        for place, weight in zip(places, weights, strict=True) if concept != NO_CONCEPT else ():
            leaf = (codes[image] * place).requires_grad_(True)
            with rules():
                score = score_of(image, target)(leaf)
            (slope,) = torch.autograd.grad(score, leaf)
            found[image, query, target] += weight * (codes[image] * slope)[:, concept].sum()
    return found


ONE = torch.ones(1, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


# Decomposition and scores


@pytest.mark.parametrize("name", NAMES)
def test_decomposition_rebuilds_every_vector_prefix_tokens_too(name: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)
    source, activation = question.source, question.between.activation
    vectors = to_vectors(one.model, activation, one.layers[0])
    assert source.codes.shape == (*vectors.shape[:2], ATOMS)
    expected = reconstruction(one.dictionaries[one.layers[0]], source.codes.flatten(0, 1).float())
    rebuilt = (source.spread + source.offset).flatten(0, 1)
    torch.testing.assert_close(rebuilt.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_alignment_score_is_equation_13(name: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)
    owners = torch.tensor([0, 1, 2, 1])
    source = question.source
    with torch.no_grad():
        found = question.scores((source.spread + source.offset)[owners], owners)
        expected = torch.stack(
            [
                torch.stack([by_hand(one, question, int(image), target)(source.codes[image]) for target in (0, 1)])
                for image in owners
            ]
        )
    assert_same(found, expected)


def test_a_vector_of_zeros_has_cosine_and_derivative_zero() -> None:
    leaf = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    directions = unit(leaf)
    (slope,) = torch.autograd.grad(directions.sum(), leaf)
    assert directions[0].tolist() == [0, 0] and slope[0].tolist() == [0, 0]
    torch.testing.assert_close(directions[1], torch.tensor([0.6, 0.8], dtype=torch.float64))


# Attributions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["integrated_gradients", "gradient_x_input"])
def test_gradients_equal_the_twin_that_treats_one_pair_at_a_time(name: str, method: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)
    steps = {"steps": 3} if method == "integrated_gradients" else {}
    places, weights = (torch.tensor([1, 3, 5]).double() / 6, ONE.expand(3) / 3) if steps else (ONE, ONE)
    expected = pair_by_pair(question, lambda b, t: by_hand(one, question, b, t), places, weights)
    found = Attribution.of(method, steps)(question, QUERIES, 4)
    assert_same(found, expected)
    assert found[1, 2].eq(0).all(), "what is no concept"


@pytest.mark.parametrize("name", NAMES)
def test_lrp_equals_the_rules_on_the_network_built_by_hand(name: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)

    def rules() -> AbstractContextManager[None]:
        return attn_lrp_rules(one.model.module) if name == "vit" else lrp_rules(one.model.module, "epsilon_plus")

    expected = pair_by_pair(question, lambda b, t: by_hand(one, question, b, t), ONE, ONE, rules)
    found = Attribution.of("lrp")(question, QUERIES, 5)
    assert_same(found, expected)
    assert not torch.allclose(found, Attribution.of("gradient_x_input")(question, QUERIES, 5))


def test_lrp_starts_at_a_source_that_has_a_rule_of_its_own() -> None:
    one = case("cnn")
    layer = "layer1.0.act2"
    dictionaries = {layer: one.dictionaries["layer1"]}
    graph = concept_graph(
        one.model, *images_and_classes(), [layer], dictionaries, options=GraphOptions(nodes="lrp", edges="lrp")
    )
    # That activation is the layer's end: the rest of the network is the same.
    same = concept_graph(
        one.model,
        *images_and_classes(),
        ["layer1"],
        one.dictionaries,
        options=GraphOptions(nodes="lrp", edges="lrp"),
    )
    assert_same(graph.nodes[layer].importance, same.nodes["layer1"].importance)


@pytest.mark.parametrize("name", ["cnn", "relu"])
def test_deep_lift_equals_the_rescale_rule_pair_by_pair(name: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)
    source = question.source
    nothing = torch.zeros_like(source.codes[0])

    def score_of(image: int, target: int) -> Callable[[Tensor], Tensor]:
        score = by_hand(one, question, image, target)

        def multiplied(codes: Tensor) -> Tensor:
            entered: list[Tensor] = []
            rules = dict.fromkeys(("relu", "silu"), lambda f, x, **_: entered.append(x.detach()) or f(x))
            with torch.no_grad(), Interception(rules):
                score(nothing)
            references = iter(entered)

            def rescaled(f: Callable[[Tensor], Tensor], x: Tensor, **_: object) -> Tensor:
                reference = next(references)
                with torch.no_grad():
                    multiplier = (f(x) - f(reference)) / (x - reference)
                return multiplier * x + (f(x) - multiplier * x).detach()

            with Interception(dict.fromkeys(("relu", "silu"), rescaled)):
                return score(codes)

        return multiplied

    expected = pair_by_pair(question, score_of, ONE, ONE)
    torch.testing.assert_close(Attribution.of("deep_lift")(question, QUERIES, 2), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_shap_equals_the_sum_over_all_coalitions(name: str) -> None:
    one = case(name)
    question = alignment(one, TARGETS)
    codes, active = question.source.codes, question.source.active
    expected = torch.zeros(*QUERIES.shape, TARGETS.shape[1], dtype=torch.float64)
    for image, query, target in pairs():
        concept = int(QUERIES[image, query])
        players = [int(q) for q in QUERIES[image] if q != NO_CONCEPT and active[image, q]]
        score = by_hand(one, question, image, target)

        def value(members: tuple[int, ...], everyone: list[int], image: int, score: Callable) -> float:
            kept = codes[image].clone()
            kept[:, [p for p in everyone if p not in members]] = 0
            return float(score(kept))

        others = [p for p in players if p != concept]
        for size in range(len(players)) if concept in players else ():
            weight = factorial(size) * factorial(len(others) - size) / factorial(len(players))
            for some in combinations(others, size):
                gain = value((*some, concept), players, image, score) - value(some, players, image, score)
                expected[image, query, target] += weight * gain
    found = Attribution.of("kernel_shap", {"samples": 16})(question, QUERIES, 7)
    assert_same(found, expected)


def test_sampled_kernel_shap_adds_up_and_does_not_depend_on_the_other_images() -> None:
    question = alignment(case("vit"), TARGETS)
    everything = torch.arange(ATOMS).expand(IMAGES, -1)
    shap = Attribution.of("kernel_shap", {"samples": 40})
    found = shap(question, None, 8)
    torch.testing.assert_close(found, shap(question, everything, 3))
    source, owners = question.source, torch.arange(IMAGES)
    with torch.no_grad():
        whole = question.scores(source.spread + source.offset, owners)
        nothing = question.scores(source.offset.expand_as(source.spread), owners)
    torch.testing.assert_close(found.sum(dim=1), whole - nothing)
    alone = alignment(case("vit"), TARGETS[1:2], pictures(IMAGES)[0][1:2])
    torch.testing.assert_close(shap(alone, None, 8)[0], found[1])


@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients_of_all_concepts_add_up_to_the_change_of_the_score(name: str) -> None:
    question = alignment(case(name), TARGETS)
    source, owners = question.source, torch.arange(IMAGES)
    with torch.no_grad():
        whole = question.scores(source.spread + source.offset, owners)
        nothing = question.scores(source.offset.expand_as(source.spread), owners)
    # Where the derivative has steps the midpoint rule converges more slowly.
    steps = 400 if name == "relu" else 60
    found = Attribution.of("integrated_gradients", {"steps": steps})(question, None, 64)
    assert found.shape == (IMAGES, ATOMS, 2)
    assert float((whole - nothing).abs().max()) > 0.1
    torch.testing.assert_close(found.sum(dim=1), whole - nothing, rtol=0, atol=4e-3 if name == "relu" else 2e-3)


@pytest.mark.parametrize("name", ["cnn", "relu"])
def test_deep_lift_of_logits_adds_up(name: str) -> None:
    one = case(name)
    question = logits(one, torch.tensor([[0, 3], [1, 2], [4, 0]]))
    source, owners = question.source, torch.arange(IMAGES)
    with torch.no_grad():
        whole = question.scores(source.spread + source.offset, owners)
        nothing = question.scores(source.offset.expand_as(source.spread), owners)
    torch.testing.assert_close(Attribution.of("deep_lift")(question, None, 2).sum(dim=1), whole - nothing)


def test_all_concepts_at_once_are_the_chosen_ones() -> None:
    question = alignment(case("cnn"), TARGETS)
    for method in ("integrated_gradients", "gradient_x_input", "lrp", "deep_lift"):
        every = Attribution.of(method)(question, None, 16)
        some = Attribution.of(method)(question, QUERIES.clamp(min=0), 16)
        expected = every.gather(1, QUERIES.clamp(min=0).unsqueeze(2).expand(-1, -1, 2))
        torch.testing.assert_close(some, expected)


# Nodes and graphs


def images_and_classes() -> tuple[Tensor, Tensor]:
    images, targets = pictures(IMAGES)
    return images, torch.stack([targets, (targets + 2) % CLASSES], dim=1)


def _graph(one: Case, batch_size: int = 32, **options: object) -> object:
    chosen = GraphOptions(concepts=2, **options)  # type: ignore[arg-type]
    return concept_graph(
        one.model, *images_and_classes(), one.layers, one.dictionaries, options=chosen, batch_size=batch_size
    )


def test_importance_is_the_attribution_of_the_reconstructions_logit() -> None:
    one = case("vit")
    images, classes = images_and_classes()
    found = node_importance(
        one.model, images, classes, one.layers, one.dictionaries, options=GraphOptions(node_options={"steps": 2})
    )[one.layers[0]]
    source = logits(one, classes).source
    places, weights = (0.25, 0.75), (0.5, 0.5)
    expected = torch.zeros(IMAGES, ATOMS, 2, dtype=torch.float64)
    for image in range(IMAGES):
        for column, label in enumerate(classes[image].tolist()):
            for place, weight in zip(places, weights, strict=True):
                leaf = (source.codes[image] * place).requires_grad_(True)
                logit = one.behind(leaf @ source.atoms + source.offset)[label]
                (slope,) = torch.autograd.grad(logit, leaf)
                expected[image, :, column] += weight * (source.codes[image] * slope).sum(dim=0)
    assert_same(found.importance, expected)
    torch.testing.assert_close(found.coefficients, source.codes.sum(dim=1))


def test_top_concepts_are_the_union_over_classes_of_those_that_the_image_has() -> None:
    importance = torch.tensor([[[5.0, 0.0], [4.0, 9.0], [9.0, 9.0], [1.0, 6.0], [0.0, 0.0]]])
    active = torch.tensor([[True, True, False, True, True]])
    found = Importance(importance, torch.ones(1, 5), active)
    assert top_concepts(found, 2).tolist() == [[1, 3, 0, NO_CONCEPT]]
    assert top_concepts(found, 1).tolist() == [[1, 0]]
    assert top_concepts(found, 9).tolist() == [[1, 3, 0, NO_CONCEPT, NO_CONCEPT]], "no effect at all"
    assert sorted(top_concepts(found.mean(), 2)[0].tolist()) == [NO_CONCEPT, 0, 1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_graph_holds_the_top_nodes_and_the_edges_between_them(name: str) -> None:
    one = case(name)
    graph = _graph(one)
    a, b = one.layers
    assert graph.pairs == ((a, b), (b, CLASSIFIER))
    nodes = graph.nodes
    question = alignment(one, nodes[b].concepts)
    expected = Attribution.of("integrated_gradients")(question, nodes[a].concepts, 32)
    missing = ~(nodes[a].there.unsqueeze(2) & nodes[b].there.unsqueeze(1))
    assert torch.equal(graph.edges[a, b].isnan(), missing)
    assert_same(graph.edges[a, b].nan_to_num(), expected.masked_fill(missing, 0))
    torch.testing.assert_close(graph.edges[b, CLASSIFIER], nodes[b].importance, equal_nan=True)
    whole = node_importance(one.model, *images_and_classes(), one.layers, one.dictionaries)
    for layer in one.layers:
        assert torch.equal(nodes[layer].concepts, top_concepts(whole[layer], 2))
        for place, concept in nodes[layer].there.nonzero().tolist():
            number = int(nodes[layer].concepts[place, concept])
            torch.testing.assert_close(
                nodes[layer].importance[place, concept], whole[layer].importance[place, number]
            )


@pytest.mark.parametrize("edges", ["integrated_gradients", "kernel_shap", "lrp"])
def test_graph_does_not_depend_on_the_batch(edges: str) -> None:
    one = case("vit")
    whole, small = _graph(one, 64, edges=edges), _graph(one, 1, edges=edges)
    for layer in one.layers:
        assert torch.equal(whole.nodes[layer].concepts, small.nodes[layer].concepts)
        torch.testing.assert_close(whole.nodes[layer].importance, small.nodes[layer].importance, equal_nan=True)
    for pair in whole.pairs:
        torch.testing.assert_close(whole.edges[pair], small.edges[pair], equal_nan=True)


def test_edges_to_the_classifier_are_by_the_attribution_of_edges() -> None:
    one = case("relu")
    graph = _graph(one, edges="gradient_x_input")
    last = one.layers[1]
    other = _graph(one, edges="gradient_x_input", nodes="gradient_x_input")
    same = concept_graph(
        one.model,
        *images_and_classes(),
        [last],
        one.dictionaries,
        options=GraphOptions(nodes="gradient_x_input"),
        nodes={last: graph.nodes[last].concepts},
    )
    torch.testing.assert_close(graph.edges[last, CLASSIFIER], same.nodes[last].importance, equal_nan=True)
    assert not torch.equal(graph.nodes[last].importance, other.nodes[last].importance)


def test_graph_of_a_class_is_the_mean_over_its_images() -> None:
    one = case("cnn")
    images, _ = images_and_classes()
    classes = torch.full((IMAGES, 1), 3)
    importance = node_importance(one.model, images, classes, one.layers, one.dictionaries)
    chosen = {layer: top_concepts(found.mean(), 2).expand(IMAGES, -1) for layer, found in importance.items()}
    graphs = concept_graph(one.model, images, classes, one.layers, one.dictionaries, nodes=chosen)
    mean = averaged(graphs)
    assert mean.classes.tolist() == [[3]]
    torch.testing.assert_close(mean.edges[one.layers], graphs.edges[one.layers].mean(dim=0, keepdim=True))
    expected = importance[one.layers[0]].mean().importance[0, chosen[one.layers[0]][0]]
    torch.testing.assert_close(mean.nodes[one.layers[0]].importance[0], expected)
    with pytest.raises(UsageError, match="averaged: expected images with the same nodes"):
        averaged(_graph(one))


def test_edge_shares_are_over_the_largest_and_0_where_nothing_is_fed() -> None:
    weights = torch.tensor([[[2.0, -1.0], [torch.nan, 4.0]], [[-1.0, -2.0], [0.0, -3.0]]])
    assert edge_shares(weights).tolist() == [[[0.5, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]


def test_parameters_get_no_gradient_and_the_network_stays_as_it_is() -> None:
    one = case("relu")
    before = {name: dict(module.__dict__) for name, module in one.model.module.named_modules()}
    for method in ("integrated_gradients", "lrp", "deep_lift", "kernel_shap"):
        _graph(one, edges=method)
    for name, module in one.model.module.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in one.model.module.parameters())


# Bad input


def test_vectors_that_are_no_numbers_are_an_images_trouble() -> None:
    one = case("relu")
    images, classes = images_and_classes()
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(NotFinite, match="layer 'layer1': expected finite vectors, got NaN or infinity in some"):
        concept_graph(one.model, images, classes, one.layers, one.dictionaries)


def test_a_graph_tells_which_images_have_a_number_everywhere() -> None:
    found = _graph(case("relu"))
    assert found.finite.all()
    source, target = found.pairs[0]
    broken = {**found.edges, (source, target): found.edges[source, target].clone()}
    broken[source, target][1, 0, 0] = torch.nan
    assert replace(found, edges=broken).finite.tolist() == [True, False, True]


def test_an_image_with_many_players_is_given_the_coalitions_that_the_fit_needs() -> None:
    one = case("relu")
    few, enough = (_graph(one, edges="kernel_shap", edge_options={"samples": count}) for count in (2, 64))
    for pair, weights in few.edges.items():
        assert torch.equal(weights.isnan(), enough.edges[pair].isnan())
        assert torch.allclose(weights.nan_to_num(0).sum(1), enough.edges[pair].nan_to_num(0).sum(1), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("layer2", "layer1")}, "layer 'layer1': expected a layer behind 'layer2'"),
        ({"layers": ("layer1", "fc")}, "layer 'fc': expected an output with spatial positions"),
        ({"layers": ("layer1", "nothing")}, "layer 'nothing': expected a module"),
        ({"layers": ()}, "layers: expected a list of different module names"),
        ({"layers": ("layer1", "layer1")}, "layers: expected a list of different module names"),
        ({"layers": ("layer1", "layer3")}, "layer 'layer3': expected a dictionary of width 16"),
        ({"layers": ("layer1", "layer4")}, "dictionaries: expected one for each layer, got none for layer4"),
        ({"classes": torch.tensor([[0], [1], [9]])}, "classes: expected indices from 0 to 4"),
        ({"classes": torch.tensor([0, 1, 2])}, r"classes \[B, M\]"),
        ({"nodes": {"layer1": torch.zeros(3, 1).long()}}, "nodes: expected concepts .* for layer 'layer2'"),
    ],
)
def test_what_no_graph_can_be_made_of_is_refused(change: dict, message: str) -> None:
    one = case("relu")
    images, classes = images_and_classes()
    width = dict.fromkeys(("fc", "nothing", "layer3"), one.dictionaries["layer1"])
    request = {"classes": classes, "layers": one.layers, "dictionaries": {**one.dictionaries, **width}, **change}
    with pytest.raises(UsageError, match=message):
        concept_graph(one.model, images, **request)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown attribution of coefficients 'ig'"):
        GraphOptions(edges="ig")
    with pytest.raises(UsageError, match="'gradient_x_input' has no option 'steps'"):
        GraphOptions(edges="gradient_x_input", edge_options={"steps": 3})
    with pytest.raises(UsageError, match="nodes: expected an attribution that can rank"):
        GraphOptions(nodes="kernel_shap")
    with pytest.raises(UsageError, match="concepts: expected at least 1"):
        GraphOptions(concepts=0)
    with pytest.raises(UsageError, match="steps: expected at least 1"):
        GraphOptions(edge_options={"steps": 0})
    one = case("cnn")
    with pytest.raises(UsageError, match=r"penalty: nothing reads 0\.5"):
        concept_graph(
            one.model, *images_and_classes(), one.layers[:1], one.dictionaries, options=GraphOptions(penalty=0.5)
        )
    with pytest.raises(UsageError, match="deep_lift: expected a network that it is defined on"):
        _graph(case("vit"), edges="deep_lift")


def test_a_dictionary_of_another_width_is_refused_with_the_layer() -> None:
    one = case("vit")
    narrow = Dictionary(torch.ones(4, 7), torch.ones(4).long())
    with pytest.raises(UsageError, match=r"layer 'blocks.0': expected a dictionary of width 24 .* got 7"):
        decompose(one.model, torch.zeros(1, 17, 24), "blocks.0", narrow)
