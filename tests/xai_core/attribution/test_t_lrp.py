from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.attribution.vit_by_hand import (
    KINDS,
    Block,
    grid,
    last_norm,
    layer_norm,
    logit,
    read_by_hand,
    vit_of_kind,
    walk,
)
from tests.xai_core.tiny import pictures, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.attention.t_lrp import through_linear, through_product, through_sum
from xai_core.errors import UsageError

METHOD = "t_lrp"


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient with the authors' stabiliser, here away from 0 on both sides."""
    if denominator == 0:
        return torch.zeros_like(denominator)
    return numerator / (denominator + (1e-9 if denominator > 0 else -1e-9))


def linear_by_hand(inputs: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Equation 4 for inputs of both signs: an output's relevance goes to the positive products, token by token."""
    found = torch.zeros_like(inputs)
    for token in range(len(inputs)):
        for out in range(len(weight)):
            positive = (inputs[token] * weight[out]).clamp(min=0)
            found[token] += positive * ratio(relevance[token, out], positive.sum())
    return found


def product_by_hand(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Each entry's relevance goes to the terms of its sum, half to the left and half to the right factor."""
    of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
    for row in range(left.shape[0]):
        for column in range(right.shape[1]):
            terms = left[row] * right[:, column]
            given = terms * ratio(relevance[row, column], terms.sum())
            of_left[row] += given / 2
            of_right[:, column] += given / 2
    return of_left, of_right


def sum_by_hand(one: Tensor, other: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 9: both operands by their terms, then scaled to shares by the magnitude of their totals."""
    terms = [torch.zeros_like(one), torch.zeros_like(one)]
    for token in range(len(one)):
        for channel in range(one.shape[1]):
            share = ratio(relevance[token, channel], one[token, channel] + other[token, channel])
            terms[0][token, channel] = one[token, channel] * share
            terms[1][token, channel] = other[token, channel] * share
    totals = [term.sum() for term in terms]
    magnitude = totals[0].abs() + totals[1].abs()
    scaled = [totals[side].abs() / magnitude * relevance.sum() / totals[side] for side in range(2)]
    return terms[0] * scaled[0], terms[1] * scaled[1]


def block_by_hand(block: nn.Module, seen: Block, relevance: Tensor) -> tuple[list[Tensor], Tensor]:
    kept, branch = sum_by_hand(seen.middle, seen.mlp_added, relevance)
    branch = linear_by_hand(seen.hidden, block.mlp.fc2.weight, branch)
    relevance = kept + linear_by_hand(seen.mlp_input, block.mlp.fc1.weight, branch)
    kept, branch = sum_by_hand(seen.entering, seen.attention_added, relevance)
    branch = linear_by_hand(seen.mixed, block.attn.proj.weight, branch)
    size = seen.values[0].shape[1]
    attention, queries, keys, values = [], [], [], []
    for head, weights in enumerate(seen.attention):
        of_mixed = branch[:, head * size : (head + 1) * size]
        of_attention, of_values = product_by_hand(weights, seen.values[head], of_mixed)
        of_queries, of_keys = product_by_hand(seen.queries[head], seen.keys[head].T, of_attention)
        attention.append(of_attention)
        queries.append(of_queries)
        keys.append(of_keys.T)
        values.append(of_values)
    of_qkv = torch.cat([*queries, *keys, *values], dim=1)
    return attention, kept + linear_by_hand(seen.normed, block.attn.qkv.weight, of_qkv)


def head_by_hand(module: nn.Module, kind: str, tokens: Tensor, of_class: int) -> Tensor:
    found = torch.zeros_like(tokens)
    if kind == "distilled":
        products = [
            (tokens[0] * module.head.weight[of_class] / 2).clamp(min=0),
            (tokens[1] * module.head_dist.weight[of_class] / 2).clamp(min=0),
        ]
        total = products[0].sum() + products[1].sum()
        found[0], found[1] = products[0] / (total + 1e-9), products[1] / (total + 1e-9)
        return found
    one = torch.ones(1, 1, dtype=torch.float64)
    weight = module.head.weight[of_class][None]
    if kind == "class_token":
        found[0] = linear_by_hand(tokens[:1], weight, one)[0]
        return found
    pooled = tokens[module.num_prefix_tokens :]
    mean = pooled.mean(dim=0)
    relevance = linear_by_hand(layer_norm(module.fc_norm, mean)[None], weight, one)[0]
    for token in range(module.num_prefix_tokens, len(tokens)):
        for channel in range(len(mean)):
            found[token, channel] = tokens[token, channel] / len(pooled) * ratio(relevance[channel], mean[channel])
    return found


def t_lrp_by_hand(module: nn.Module, kind: str, image: Tensor, of_class: int, start_layer: int = 0) -> Tensor:
    seen = walk(module, image)
    score = logit(module, kind, seen[-1].leaving, of_class)
    gradients = [torch.autograd.grad(score, one.attention, retain_graph=True) for one in seen]
    with torch.no_grad():
        relevance = head_by_hand(module, kind, last_norm(module, seen[-1].leaving), of_class)
        product = torch.eye(len(relevance), dtype=torch.float64)
        for position in reversed(range(start_layer, len(seen))):
            attention, relevance = block_by_hand(module.blocks[position], seen[position], relevance)
            matrix = torch.eye(len(relevance), dtype=torch.float64)
            for of_head, gradient in zip(attention, gradients[position], strict=True):
                matrix += (of_head * gradient).clamp(min=0) / len(attention)
            product = product @ matrix
        return grid(module, read_by_hand(module, kind, len(product)) @ product)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_rules_one_after_the_other(kind: str) -> None:
    model = vit_of_kind(kind)
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    found = attribute_classes(model, images, classes, method=METHOD, native=True)
    for image in range(2):
        for position in range(2):
            wanted = t_lrp_by_hand(model.module, kind, images[image], int(classes[image, position]))
            assert wanted.amax() > 0
            torch.testing.assert_close(
                found[image, position].double(), wanted, rtol=1e-6, atol=1e-9 * wanted.amax()
            )


def test_float32_weights_are_explained_in_float64() -> None:
    model = vit_of_kind("class_token")
    model.module.float()
    images, targets = pictures(2)
    single = attribute(model, images.float(), targets, method=METHOD, native=True)
    assert model.dtype == torch.float32
    model.module.double()
    double = attribute(model, images.float().double(), targets, method=METHOD, native=True)
    torch.testing.assert_close(single, double, rtol=1e-6, atol=0)


def test_start_layer_leaves_out_the_blocks_before_it() -> None:
    model = vit_of_kind("class_token")
    images, targets = pictures(1)
    found = attribute(model, images, targets, method=METHOD, options={"start_layer": 1}, native=True)
    wanted = t_lrp_by_hand(model.module, "class_token", images[0], int(targets[0]), start_layer=1)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-6, atol=1e-9 * wanted.amax())
    assert not torch.allclose(found, attribute(model, images, targets, method=METHOD, native=True))


def test_the_rules_keep_the_relevance() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    relevance = draw(2, 5, 6)
    total = relevance.sum(dim=(1, 2))
    of_inputs = through_linear(draw(2, 5, 40), draw(6, 40), relevance)
    torch.testing.assert_close(of_inputs.sum(dim=(1, 2)), total)
    for pair in (
        through_sum(draw(2, 5, 6), draw(2, 5, 6), relevance),
        through_product(draw(2, 5, 3), draw(2, 3, 6), relevance),
    ):
        torch.testing.assert_close(pair[0].sum(dim=(1, 2)) + pair[1].sum(dim=(1, 2)), total)
        assert (pair[0].sum(dim=(1, 2)).sign() * total.sign() >= 0).all()


def test_nothing_is_given_where_nothing_came_from() -> None:
    zeros, relevance = torch.zeros(1, 3, 3), torch.ones(1, 3, 3)
    for found in (
        through_linear(zeros, torch.ones(3, 3), relevance),
        *through_sum(zeros, zeros, relevance),
        *through_product(zeros, zeros, relevance),
    ):
        assert not found.any()


def test_it_is_zero_where_no_attention_raises_the_logit() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.module.head.weight.zero_()
    images, targets = pictures(2)
    assert not attribute(model, images, targets, method=METHOD).any()


def test_a_block_that_is_not_there_is_refused() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="start_layer"):
        attribute(tiny_vit(), images, targets, method=METHOD, options={"start_layer": 2})
    with pytest.raises(UsageError, match=r"t_lrp\.start_layer"):
        attribute(tiny_vit(), images, targets, method=METHOD, options={"start_layer": -1})


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = tiny_vit()
    model.module.head = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="its head is not a linear layer"):
        attribute(model, images, targets, method=METHOD)
