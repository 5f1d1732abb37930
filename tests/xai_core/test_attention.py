"""The attention probe: what it reads, what it leaves behind, and which transformers it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tests.xai_core.attribution.slow_vit import (
    COLUMNS,
    HEADS,
    KINDS,
    PATCHES,
    ROWS,
    attention_gradients,
    build,
    pictures,
    run_slowly,
)
from xai_core.attention import (
    POINTS,
    blocks_of,
    explicit_attention,
    global_attention,
    patch_map,
    pooled_head,
    probed,
    readout,
    softmax_attention,
    split_heads,
    token_count,
)
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec

every_kind = pytest.mark.parametrize("kind", KINDS)


def named(name: str, **arguments: Any) -> Classifier:
    return Classifier(timm.create_model(name, num_classes=3, **arguments), ModelSpec(name, False))


@every_kind
def test_the_slow_transformer_is_the_model(kind: str) -> None:
    model, images = build(kind), pictures(2)
    slow = torch.stack([run_slowly(model, image).logits for image in images])
    torch.testing.assert_close(slow.detach(), model(images), rtol=1e-10, atol=1e-12)


@every_kind
def test_points_are_what_flows_there(kind: str) -> None:
    model, images = build(kind), pictures(2)
    with torch.no_grad(), probed(model, list(POINTS)) as found:
        model(images)
    for b, image in enumerate(images):
        trace = run_slowly(model, image)
        for place, block in enumerate(blocks_of(model)):
            _, _, values = split_heads(model, found["qkv"][place])
            joined = values[b].transpose(0, 1).flatten(1)
            mixed = torch.cat([trace.attention[place][h] @ values[b, h] for h in range(HEADS)], dim=1)
            expected = {
                "block_input": trace.entering[place],
                "attention": torch.stack(trace.attention[place]),
                "mixed": mixed,
                "attention_output": mixed @ block.attn.proj.weight.T + block.attn.proj.bias,
            }
            torch.testing.assert_close(joined, trace.values[place].detach())
            for point, tensor in expected.items():
                torch.testing.assert_close(found[point][place][b], tensor.detach())
            middle = found["block_input"][place] + found["attention_output"][place]
            torch.testing.assert_close(found["normed"][place], block.norm1(found["block_input"][place]))
            torch.testing.assert_close(found["block_output"][place], middle + found["mlp_output"][place])


def test_gradients_of_every_block_and_only_behind_the_first_read() -> None:
    model, images = build("class_token"), pictures(2)
    expected = [attention_gradients(run_slowly(model, image), 3) for image in images]
    for first in (0, 2, 3):
        with torch.enable_grad(), probed(model, ["attention"], with_gradient=True, first=first) as found:
            logits = model(images)
        assert len(found["attention"]) == 4 - first
        assert [tensor.is_leaf for tensor in found["attention"]] == [True] + [False] * (3 - first)
        gradients = torch.autograd.grad(logits[:, 3].sum(), found["attention"])
        for place, gradient in enumerate(gradients):
            for b in range(2):
                torch.testing.assert_close(gradient[b], torch.stack(expected[b][first + place]))


def test_a_point_may_be_kept_reduced() -> None:
    model, images = build("class_token"), pictures(1)
    with probed(model, ["attention", "qkv"], reduce={"attention": lambda tensor: tensor.mean(dim=1)}) as found:
        model(images)
    assert [tensor.ndim for tensor in found["attention"] + found["qkv"]] == [3] * 8


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    model = build("class_token")
    model.module.blocks[1].attn.fused_attn = False
    before = [block.attn.fused_attn for block in blocks_of(model)]

    def fail() -> None:
        with probed(model, list(POINTS)):
            assert not any(block.attn.fused_attn for block in blocks_of(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [block.attn.fused_attn for block in blocks_of(model)] == before
    hooks = [
        hook
        for module in model.module.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks)
    ]
    assert hooks == []


def test_explicit_attention_has_second_derivatives() -> None:
    model, images = build("class_token"), pictures(1).requires_grad_(True)
    with explicit_attention(model.module), torch.enable_grad():
        score = model(images)[0, 0]
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), images)
    assert torch.isfinite(second).all()
    assert float(second.abs().max()) > 0


@every_kind
def test_readout_weighs_the_tokens_that_the_head_reads(kind: str) -> None:
    model = build(kind)
    expected = torch.zeros(token_count(model), dtype=torch.float64)
    for token, weight in KINDS[kind].read.items():
        expected[token] = weight
    torch.testing.assert_close(readout(model), expected)
    model.module.head.weight.zero_()
    with torch.no_grad():
        torch.testing.assert_close(readout(model), expected)


def test_readout_of_a_pooling_that_counts_prefix_tokens() -> None:
    model = named("vit_tiny_patch16_224", img_size=32, depth=1, global_pool="avg", pool_include_prefix=True)
    torch.testing.assert_close(readout(model), torch.full((5,), 0.2))


@every_kind
def test_patch_map_leaves_prefix_tokens_out(kind: str) -> None:
    model, prefix = build(kind), KINDS[kind].prefix
    tokens = torch.arange(prefix + PATCHES)
    assert patch_map(model, tokens).tolist() == (prefix + torch.arange(PATCHES)).view(ROWS, COLUMNS).tolist()
    with pytest.raises(UsageError, match="give images of that size"):
        patch_map(model, tokens[1:])


@every_kind
def test_plain_transformers_have_all_that_is_needed(kind: str) -> None:
    model = build(kind)
    assert [need(model, None) for need in (softmax_attention, global_attention, pooled_head)] == [None] * 3


@pytest.mark.parametrize(
    ("name", "arguments", "need", "reason"),
    [
        ("resnet10t", {}, softmax_attention, "no list of transformer blocks"),
        ("cait_xxs24_224", {"img_size": 32}, softmax_attention, "not between all 5 tokens"),
        ("xcit_nano_12_p16_224", {}, softmax_attention, "how large a patch is"),
        ("vit_dwee_patch16_reg1_gap_256", {"img_size": 32, "depth": 1}, softmax_attention, "matrices for 4 heads"),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1}, global_attention, "pass through 'attn.qkv'"),
        (
            "vit_base_patch16_siglip_224",
            {"img_size": 32, "depth": 1},
            pooled_head,
            "its head pools tokens by 'map'",
        ),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "depth": 1, "global_pool": "max"},
            pooled_head,
            "pools tokens by 'max'",
        ),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "depth": 1, "scale_attn_norm": True},
            global_attention,
            "does more than weigh values",
        ),
    ],
)
def test_other_structures_are_refused_with_the_reason(
    name: str, arguments: dict[str, Any], need: Any, reason: str
) -> None:
    assert reason in need(named(name, **arguments), None)


def test_softmax_attention_is_enough_where_queries_are_out_of_reach() -> None:
    model = named("beit_base_patch16_224", img_size=32, depth=1)
    assert softmax_attention(model, None) is None
