from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.xai_core.attribution.vit_by_hand import (
    KINDS,
    Block,
    grid,
    logit,
    read_by_hand,
    scale,
    vit_of_kind,
    walk,
)
from tests.xai_core.tiny import pictures, tiny_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.attention.token_tm import transformation_weights
from xai_core.errors import UsageError

METHOD = "token_tm"


def weights_by_hand(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """Equations 12 and 13, token by token."""
    cosines = [one @ other / (one.norm() * other.norm()) for one, other in zip(before, after, strict=True)]
    total = sum(cosine.exp() for cosine in cosines)
    return [
        other.norm() / one.norm() * cosine.exp() / total
        for one, other, cosine in zip(before, after, cosines, strict=True)
    ]


def block_by_hand(block: nn.Module, seen: Block, gradients: list[Tensor]) -> Tensor:
    """``(I + W_mlp) (I + E_h[relu(dA_h) * (A_h W_h)])``, equations 14 to 17."""
    count, size = len(seen.entering), seen.values[0].shape[1]
    by_attention = torch.eye(count, dtype=torch.float64)
    for head, attention in enumerate(seen.attention):
        writing = block.attn.proj.weight[:, head * size : (head + 1) * size]
        transformed = [scale(block.ls1) * (writing @ value) for value in seen.values[head]]
        weights = weights_by_hand(list(seen.entering), transformed)
        for to in range(count):
            for source in range(count):
                positive = gradients[head][to, source].clamp(min=0)
                by_attention[to, source] += (
                    positive * attention[to, source] * weights[source] / len(seen.attention)
                )
    by_mlp = torch.eye(count, dtype=torch.float64)
    for token, weight in enumerate(weights_by_hand(list(seen.middle), list(seen.mlp_added))):
        by_mlp[token, token] += weight
    return by_mlp @ by_attention


def token_tm_by_hand(module: nn.Module, kind: str, image: Tensor, of_class: int) -> Tensor:
    seen = walk(module, image)
    score = logit(module, kind, seen[-1].leaving, of_class)
    contributions = torch.diag(torch.stack([token.norm() for token in seen[0].entering]))
    for block, one in zip(module.blocks, seen, strict=True):
        gradients = torch.autograd.grad(score, one.attention, retain_graph=True)
        contributions = block_by_hand(block, one, list(gradients)) @ contributions
    return grid(module, read_by_hand(module, kind, len(contributions)) @ contributions).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_product_of_matrices(kind: str) -> None:
    model = vit_of_kind(kind)
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    found = attribute_classes(model, images, classes, method=METHOD, native=True)
    for image in range(2):
        for position in range(2):
            wanted = token_tm_by_hand(model.module, kind, images[image], int(classes[image, position]))
            assert wanted.amax() > 0
            torch.testing.assert_close(
                found[image, position].double(), wanted, rtol=1e-6, atol=1e-9 * wanted.amax()
            )


def test_an_unchanged_token_weighs_its_share() -> None:
    tokens = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(transformation_weights(tokens, tokens), torch.full((4,), 0.25).double())
    torch.testing.assert_close(transformation_weights(tokens, 3 * tokens), torch.full((4,), 0.75).double())


def test_a_turned_token_weighs_less_than_one_that_keeps_its_direction() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    after = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    kept, turned = transformation_weights(before, after)
    torch.testing.assert_close(kept / turned, torch.tensor(2.0).double().exp())


def test_a_token_of_length_zero_weighs_nothing() -> None:
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    weights = transformation_weights(before, torch.ones(2, 2))
    assert weights[0] == 0
    assert torch.isfinite(weights).all()


def test_it_is_zero_where_no_attention_raises_the_logit() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.module.head.weight.zero_()
    images, targets = pictures(2)
    assert not attribute(model, images, targets, method=METHOD).any()


def test_it_refuses_what_has_no_tokens() -> None:
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="fits vit models"):
        attribute(tiny_cnn(), images, targets, method=METHOD)
