"""Tiny vision transformers in float64, and a forward pass through their weights written out token by token."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from tests.xai_core.tiny import CLASSES, SIZE
from xai_core.models import Classifier, ModelSpec

KINDS = ("class_token", "distilled", "averaged", "registers_and_layer_scale")
NAMES = {
    "class_token": "vit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "averaged": "vit_base_patch16_gap_224",
    "registers_and_layer_scale": "vit_wee_patch16_reg1_gap_256",
}


def vit_of_kind(kind: str) -> Classifier:
    """Two blocks, two heads and 16 patch tokens, every parameter drawn at random."""
    torch.manual_seed(0)
    arguments = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_classes": CLASSES,
    }
    module = timm.create_model(NAMES[kind], **arguments).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.5)
    return Classifier(module, ModelSpec(NAMES[kind], False, create_args=arguments))


@dataclass
class Block:
    """What one image left in one block; lists run over heads, ``attention`` is part of the graph."""

    entering: Tensor
    normed: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    attention: list[Tensor]
    mixed: Tensor
    attention_added: Tensor
    middle: Tensor
    mlp_input: Tensor
    hidden: Tensor
    mlp_added: Tensor
    leaving: Tensor


def walk(module: nn.Module, image: Tensor) -> list[Block]:
    """One image ``[3, H, W]`` through all blocks; gradients flow, from the first attention on."""
    with torch.no_grad():
        patches = module.patch_embed(image[None])
        tokens = module.norm_pre(module._pos_embed(patches))[0]
    tokens.requires_grad_(True)
    blocks = []
    for block in module.blocks:
        blocks.append(_walk_block(block, tokens))
        tokens = blocks[-1].leaving
    return blocks


def _walk_block(block: nn.Module, tokens: Tensor) -> Block:
    heads, width = block.attn.num_heads, tokens.shape[1]
    size = width // heads
    normed = torch.stack([layer_norm(block.norm1, token) for token in tokens])
    projected = torch.stack([block.attn.qkv.weight @ token + block.attn.qkv.bias for token in normed])
    queries, keys, values, attention, mixed = [], [], [], [], []
    for head in range(heads):
        here = slice(head * size, (head + 1) * size)
        queries.append(projected[:, :width][:, here])
        keys.append(projected[:, width : 2 * width][:, here])
        values.append(projected[:, 2 * width :][:, here])
        rows = []
        for query in queries[head]:
            scores = torch.stack([(query * key).sum() for key in keys[head]]) / size**0.5
            rows.append(scores.exp() / scores.exp().sum())
        attention.append(torch.stack(rows))
        mixed.append(attention[head] @ values[head])
    joined = torch.cat(mixed, dim=1)
    added = scale(block.ls1) * (joined @ block.attn.proj.weight.T + block.attn.proj.bias)
    middle = tokens + added
    mlp_input = torch.stack([layer_norm(block.norm2, token) for token in middle])
    before = mlp_input @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = before * 0.5 * (1 + torch.erf(before / 2**0.5))
    mlp_added = scale(block.ls2) * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    return Block(
        tokens,
        normed,
        queries,
        keys,
        values,
        attention,
        joined,
        added,
        middle,
        mlp_input,
        hidden,
        mlp_added,
        middle + mlp_added,
    )


def layer_norm(norm: nn.Module, token: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return token
    centred = token - token.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def scale(layer: nn.Module) -> Tensor | float:
    return 1.0 if isinstance(layer, nn.Identity) else layer.gamma


def last_norm(module: nn.Module, tokens: Tensor) -> Tensor:
    return torch.stack([layer_norm(module.norm, token) for token in tokens])


def logit(module: nn.Module, kind: str, tokens: Tensor, of_class: int) -> Tensor:
    """The class's logit as the head reads it off tokens ``[T, C]`` that left a block."""
    read = last_norm(module, tokens)
    if kind == "class_token":
        return module.head.weight[of_class] @ read[0] + module.head.bias[of_class]
    if kind == "distilled":
        first = module.head.weight[of_class] @ read[0] + module.head.bias[of_class]
        second = module.head_dist.weight[of_class] @ read[1] + module.head_dist.bias[of_class]
        return (first + second) / 2
    pooled = layer_norm(module.fc_norm, read[module.num_prefix_tokens :].mean(dim=0))
    return module.head.weight[of_class] @ pooled + module.head.bias[of_class]


def read_by_hand(module: nn.Module, kind: str, count: int) -> Tensor:
    """The weight of each token in the head."""
    row = torch.zeros(count, dtype=torch.float64)
    if kind == "class_token":
        row[0] = 1
    elif kind == "distilled":
        row[:2] = 0.5
    else:
        row[module.num_prefix_tokens :] = 1 / (count - module.num_prefix_tokens)
    return row


def grid(module: nn.Module, row: Tensor) -> Tensor:
    """The patch tokens' entries as a map."""
    return row[module.num_prefix_tokens :].view(SIZE // 8, SIZE // 8)
