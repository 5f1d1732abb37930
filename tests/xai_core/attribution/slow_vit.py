"""Tiny transformers higher than wide, what a walk through their weights leaves, and matrix products by loops."""

from __future__ import annotations

from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn

from tests.xai_core.attribution.vit_by_hand import last_norm, layer_norm, walk
from xai_core.models import Classifier, ModelSpec

HEIGHT, WIDTH, PATCH, HEADS, CLASSES = 24, 16, 8, 2, 5
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
PATCHES = ROWS * COLUMNS

Matrix = list[list[float]]


@dataclass(frozen=True)
class Kind:
    """A tiny transformer: how many tokens stand before the patches, and the weight with which each row is read."""

    name: str
    prefix: int
    read: dict[int, float]
    arguments: dict[str, object] = field(default_factory=dict)


KINDS = {
    "class_token": Kind("vit_tiny_patch16_224", 1, {0: 1.0}),
    "distilled": Kind("deit_tiny_distilled_patch16_224", 2, {0: 0.5, 1: 0.5}),
    "registers": Kind("vit_tiny_patch16_224", 3, {0: 1.0}, {"reg_tokens": 2}),
    "pooled": Kind(
        "vit_tiny_patch16_224",
        0,
        dict.fromkeys(range(PATCHES), 1 / PATCHES),
        {"class_token": False, "global_pool": "avg"},
    ),
    "pooled_registers": Kind(
        "vit_tiny_patch16_224",
        2,
        dict.fromkeys(range(2, 2 + PATCHES), 1 / PATCHES),
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    ),
}


def build(kind: str, depth: int = 4) -> Classifier:
    """The tiny transformer of a kind, random in float64, lively enough for its heads to differ."""
    torch.manual_seed(3)
    arguments = {
        "img_size": (HEIGHT, WIDTH),
        "patch_size": PATCH,
        "embed_dim": 12,
        "depth": depth,
        "num_heads": HEADS,
        "num_classes": CLASSES,
        **KINDS[kind].arguments,
    }
    module = timm.create_model(KINDS[kind].name, **arguments).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.35)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.7, 1.3)
    return Classifier(module, ModelSpec(KINDS[kind].name, False, create_args=arguments))


def pictures(count: int) -> Tensor:
    """Random inputs in float64, higher than wide."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


@dataclass
class Trace:
    """What one picture left: logits ``[C]``, and by block the attention of each head and what else flows."""

    logits: Tensor
    attention: list[list[Tensor]]  # block, head: [T, T], nodes of the graph
    entering: list[Tensor]  # block: tokens before the first norm [T, C]
    values: list[Tensor]  # block: heads joined [T, C]


def run_slowly(model: Classifier, picture: Tensor) -> Trace:
    """One picture ``[3, H, W]`` through the weights, with the graph from the attention of every block on."""
    blocks = walk(model.module, picture)
    return Trace(
        _head(model.module, blocks[-1].leaving),
        [block.attention for block in blocks],
        [block.entering.detach() for block in blocks],
        [torch.cat(block.values, dim=1).detach() for block in blocks],
    )


def attention_gradients(trace: Trace, target: int) -> list[list[Tensor]]:
    """Gradients of a logit with respect to the attention of each block and head."""
    flat = [head for block in trace.attention for head in block]
    found = torch.autograd.grad(trace.logits[target], flat, retain_graph=True)
    return [list(found[start : start + HEADS]) for start in range(0, len(flat), HEADS)]


def integrated_rows(model: Classifier, picture: Tensor, target: int, steps: int) -> Matrix:
    """Last block's attention gradients: mean over ``steps`` pictures of the path, positive part, mean of heads."""
    sums = [0.0 * head.detach() for head in run_slowly(model, picture).attention[-1]]
    for step in range(steps):
        trace = run_slowly(model, picture * (step / (steps - 1)))
        last = attention_gradients(trace, target)[-1]
        sums = [total + gradient for total, gradient in zip(sums, last, strict=True)]
    return [
        [
            sum(max(float(total[row, column]) / steps, 0.0) for total in sums) / HEADS
            for column in range(sums[0].shape[1])
        ]
        for row in range(sums[0].shape[0])
    ]


def mean_of_heads(heads: list[Tensor]) -> Matrix:
    """The mean matrix."""
    entries, span = [head.tolist() for head in heads], range(len(heads[0]))
    return [[sum(head[row][column] for head in entries) / len(heads) for column in span] for row in span]


def times(one: Matrix, other: Matrix) -> Matrix:
    """A product of square matrices."""
    span = range(len(one))
    return [[sum(one[row][k] * other[k][column] for k in span) for column in span] for row in span]


def plus(one: Matrix, other: Matrix) -> Matrix:
    """A sum of matrices."""
    return [[a + b for a, b in zip(left, right, strict=True)] for left, right in zip(one, other, strict=True)]


def identity(size: int) -> Matrix:
    """The identity."""
    return [[float(row == column) for column in range(size)] for row in range(size)]


def read_map(kind: str, tokens: Matrix) -> Tensor:
    """The rows that the head reads, weighted, as a map of the patches ``[rows, columns]``."""
    prefix, read = KINDS[kind].prefix, KINDS[kind].read
    found = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for patch in range(PATCHES):
        found[patch // COLUMNS, patch % COLUMNS] = sum(
            weight * tokens[row][prefix + patch] for row, weight in read.items()
        )
    return found


def _head(module: nn.Module, tokens: Tensor) -> Tensor:
    read = last_norm(module, tokens)
    if hasattr(module, "head_dist"):
        return (_linear(module.head, read[0]) + _linear(module.head_dist, read[1])) / 2
    pooled = read[module.num_prefix_tokens :].mean(dim=0) if module.global_pool == "avg" else read[0]
    return _linear(module.head, layer_norm(module.fc_norm, pooled))


def _linear(layer: nn.Module, token: Tensor) -> Tensor:
    return layer.weight @ token + layer.bias
