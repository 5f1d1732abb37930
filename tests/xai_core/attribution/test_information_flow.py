from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn

from tests.xai_core.attribution.vit_by_hand import KINDS, Block, grid, logit, read_by_hand, vit_of_kind, walk
from tests.xai_core.tiny import CLASSES, SIZE, pictures, tiny_vit
from xai_core.attribution import attribute, attribute_classes
from xai_core.attribution.attention.information_flow import block_transition, class_attention
from xai_core.errors import UsageError
from xai_core.models import Classifier, ModelSpec

METHOD = "information_flow"


def transition_by_hand(seen: Block, gradients: list[Tensor], early: list[Tensor]) -> Tensor:
    count, heads = len(seen.entering), len(seen.attention)
    importance = []
    for attention, gradient in zip(seen.attention, gradients, strict=True):
        importance.append((attention.T @ gradient).abs().mean())
    growth = [seen.mlp_added[token].norm() / seen.middle[token].norm() for token in range(count)]
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for to in range(count):
        for source in range(count):
            strongest = max(
                seen.attention[head][to, source] * importance[head] / sum(importance) for head in range(heads)
            )
            raising = sum(early[head][to, source] for head in range(heads)) / heads
            kept = (strongest * raising).clamp(min=0)
            entering, added = seen.entering[source].norm(), seen.attention_added[source].norm()
            entry = kept * added / (entering + added)
            if to == source:
                entry = entry + entering / (entering + added)
            middle, mlp = seen.middle[source].norm(), seen.mlp_added[source].norm()
            factor = growth[source] / sum(growth) * mlp / (middle + mlp) + middle / (middle + mlp)
            matrix[to, source] = entry * factor
    return torch.stack([row / row.sum() for row in matrix])


def information_flow_by_hand(module: nn.Module, kind: str, image: Tensor, of_class: int) -> Tensor:
    seen = walk(module, image)
    score = logit(module, kind, seen[-1].leaving, of_class)
    joint = torch.eye(len(seen[0].entering), dtype=torch.float64)
    for one in seen:
        gradients = torch.autograd.grad(score, one.attention, retain_graph=True)
        early_score = logit(module, kind, one.leaving, of_class)
        early = torch.autograd.grad(early_score, one.attention, retain_graph=True)
        joint = transition_by_hand(one, list(gradients), list(early)) @ joint
    return grid(module, read_by_hand(module, kind, len(joint)) @ joint).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_rollout_of_whole_blocks(kind: str) -> None:
    model = vit_of_kind(kind)
    images, _ = pictures(2)
    classes = torch.tensor([[0, 3], [4, 1]])
    found = attribute_classes(model, images, classes, method=METHOD, native=True)
    for image in range(2):
        for position in range(2):
            wanted = information_flow_by_hand(model.module, kind, images[image], int(classes[image, position]))
            assert wanted.amax() > 0
            torch.testing.assert_close(
                found[image, position].double(), wanted, rtol=1e-6, atol=1e-9 * wanted.amax()
            )


def test_rows_of_a_block_add_to_one() -> None:
    attention = torch.rand(2, 5, 5)
    skip, mlp = torch.rand(2, 2, 5) + 0.1
    matrix = block_transition(attention, skip, 1 - skip, mlp)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, 5))


def test_a_block_without_attention_leaves_tokens_where_they_are() -> None:
    matrix = block_transition(
        torch.zeros(1, 4, 4), torch.rand(1, 4) + 0.1, torch.rand(1, 4), torch.rand(1, 4) + 0.1
    )
    torch.testing.assert_close(matrix[0], torch.eye(4))


def test_heads_that_do_not_matter_count_for_nothing() -> None:
    attention = torch.rand(1, 2, 4, 4)
    gradient = torch.zeros(1, 2, 4, 4)
    assert not class_attention(attention, gradient, torch.ones_like(attention)).any()
    gradient[:, 1] = 1
    torch.testing.assert_close(class_attention(attention, gradient, torch.ones_like(attention)), attention[:, 1])


def test_it_is_zero_where_nothing_raises_the_logit() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.module.head.weight.zero_()
    images, targets = pictures(2)
    assert not attribute(model, images, targets, method=METHOD).any()


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
@pytest.mark.parametrize("method", ["information_flow", "t_lrp", "token_tm"])
def test_blocks_of_another_build_are_refused(block: type[nn.Module], method: str) -> None:
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, block_fn=block, **arguments)
    images, targets = pictures(1)
    with pytest.raises(UsageError, match="its blocks"):
        attribute(Classifier(module, ModelSpec("a_vit", False)), images.float(), targets, method=method)
