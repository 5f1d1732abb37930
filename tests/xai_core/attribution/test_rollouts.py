"""Attention rollout, gradient rollout and generic attention against products of matrices by loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.attribution.slow_vit import (
    HEADS,
    KINDS,
    PATCHES,
    Matrix,
    attention_gradients,
    build,
    identity,
    mean_of_heads,
    pictures,
    plus,
    read_map,
    run_slowly,
    times,
)
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError
from xai_core.registry import methods, variant_id

every_kind = pytest.mark.parametrize("kind", KINDS)
CLASSES = torch.tensor([[0, 3], [4, 1]])


def without_least(matrix: Matrix, ratio: float) -> Matrix:
    entries = sorted(value for row in matrix for value in row)
    count = int(len(entries) * ratio)
    limit = entries[count - 1] if count else float("-inf")
    return [[value if value > limit else 0.0 for value in row] for row in matrix]


def rolled(blocks: list[Matrix], ratio: float) -> Matrix:
    product = identity(len(blocks[0]))
    for matrix in blocks:
        joined = plus(without_least(matrix, ratio), identity(len(matrix)))
        normalised = [[value / sum(row) for value in row] for row in joined]
        product = times(normalised, product)
    return product


def fused(heads: list[Tensor], how: str) -> Matrix:
    choose = {"mean": lambda values: sum(values) / len(values), "max": max, "min": min}[how]
    entries, span = [head.tolist() for head in heads], range(len(heads[0]))
    return [[choose([head[i][j] for head in entries]) for j in span] for i in span]


def weighted(kind: str, image: Tensor, target: int, *, clamp_heads: bool) -> list[Matrix]:
    """By block: attention times gradient, positive part taken after the mean of heads or before it."""
    trace = run_slowly(build(kind), image)
    found = []
    for attention, gradients in zip(trace.attention, attention_gradients(trace, target), strict=True):
        products = [a * g for a, g in zip(attention, gradients, strict=True)]
        if clamp_heads:
            products = [product.clamp(min=0) for product in products]
        mean = mean_of_heads(products)
        found.append([[max(value, 0.0) for value in row] for row in mean])
    return found


@every_kind
@pytest.mark.parametrize("how", ["mean", "max", "min"])
def test_attention_rollout_is_the_product_over_blocks(kind: str, how: str) -> None:
    model, images = build(kind), pictures(2)
    for ratio in (0.0, 0.4):
        options = {"head_fusion": how, "discard_ratio": ratio}
        got = attribute_classes(
            model, images, CLASSES, method="attention_rollout", options=options, native=True
        ).double()
        for b, image in enumerate(images):
            blocks = [fused(heads, how) for heads in run_slowly(model, image).attention]
            expected = read_map(kind, rolled(blocks, ratio))
            for k in range(2):
                torch.testing.assert_close(got[b, k], expected, rtol=1e-6, atol=1e-8)


def test_attention_rollout_of_pooled_patches_adds_to_one() -> None:
    maps = attribute(
        build("pooled"), pictures(3), torch.tensor([0, 1, 2]), method="attention_rollout", native=True
    )
    torch.testing.assert_close(maps.flatten(1).sum(dim=1), torch.ones(3))


@every_kind
def test_grad_rollout_is_the_rollout_of_weighted_attention(kind: str) -> None:
    model, images = build(kind), pictures(2)
    for ratio in (0.9, 0.0):
        got = attribute_classes(
            model, images, CLASSES, method="grad_rollout", options={"discard_ratio": ratio}, native=True
        ).double()
        assert float(got.max()) > 0
        for b, image in enumerate(images):
            for k in range(2):
                blocks = weighted(kind, image, int(CLASSES[b, k]), clamp_heads=False)
                expected = read_map(kind, rolled(blocks, ratio))
                torch.testing.assert_close(got[b, k], expected, rtol=1e-6, atol=1e-9)


@every_kind
@pytest.mark.parametrize("start", [0, 2])
def test_generic_attention_gathers_relevance_over_blocks(kind: str, start: int) -> None:
    model, images = build(kind), pictures(2)
    got = attribute_classes(
        model, images, CLASSES, method="generic_attention", options={"start_layer": start}, native=True
    ).double()
    for b, image in enumerate(images):
        for k in range(2):
            relevance = identity(KINDS[kind].prefix + PATCHES)
            for matrix in weighted(kind, image, int(CLASSES[b, k]), clamp_heads=True)[start:]:
                relevance = plus(relevance, times(matrix, relevance))
            torch.testing.assert_close(got[b, k], read_map(kind, relevance), rtol=1e-6, atol=1e-9)


def test_what_the_entries_say_of_themselves() -> None:
    rollout, graded = methods.get("attention_rollout"), methods.get("grad_rollout")
    assert (rollout.class_specific, rollout.gradient_free) == (False, True)
    assert (graded.class_specific, graded.gradient_free) == (True, False)
    assert variant_id("grad_rollout", graded.options()) == "grad_rollout"
    assert variant_id("grad_rollout", graded.options(discard_ratio=0.0)) == "grad_rollout[discard_ratio=0.0]"


@pytest.mark.parametrize("method", ["attention_rollout", "grad_rollout", "generic_attention"])
def test_all_classes_share_one_forward_pass(method: str) -> None:
    model, images = build("class_token"), pictures(3)
    attribute(model, images[:1], torch.tensor([0]), method=method)  # the trial pass of a first look is over
    passed: list[int] = []
    handle = model.module.patch_embed.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    attribute_classes(model, images, torch.arange(4).expand(3, 4), method=method, batch_size=2)
    handle.remove()
    assert passed == [2, 1]


def test_a_head_without_gradient_gives_zeros_for_patches() -> None:
    model = build("class_token")
    model.module.head.weight.zero_()
    for method in ("grad_rollout", "generic_attention"):
        maps = attribute(model, pictures(1), torch.tensor([1]), method=method)
        assert float(maps.abs().max()) == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("attention_rollout", {"head_fusion": "sum"}, r"attention_rollout.head_fusion: expected one of mean, max"),
        ("attention_rollout", {"discard_ratio": 1.0}, r"attention_rollout.discard_ratio: .* below 1, got 1.0"),
        ("grad_rollout", {"discard_ratio": -0.1}, r"grad_rollout.discard_ratio: expected at least 0"),
        ("generic_attention", {"start_layer": -1}, r"generic_attention.start_layer: expected a block from 0"),
        ("generic_attention", {"start_layer": 4}, r"start_layer=4 is behind its last block: expected 0..3"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attribute(build("class_token"), pictures(1), torch.tensor([0]), method=method, options=options)


def test_heads_differ_enough_to_tell_the_fusions_apart() -> None:
    heads = [head.detach() for head in run_slowly(build("class_token"), pictures(1)[0]).attention[0]]
    assert len(heads) == HEADS
    assert float((heads[0] - heads[1]).abs().max()) > 0.05
