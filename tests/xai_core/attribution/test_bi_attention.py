"""Bidirectional attribution, both versions, against perception and feedback by loops over layers and heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.attribution.slow_vit import (
    KINDS,
    PATCHES,
    Matrix,
    attention_gradients,
    build,
    identity,
    integrated_rows,
    mean_of_heads,
    pictures,
    plus,
    read_map,
    run_slowly,
    times,
)
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError

CLASSES = torch.tensor([[0, 3], [4, 1]])
METHOD = "bi_attention"


def head_shares(attention: list[Tensor], gradients: list[Tensor]) -> list[float]:
    importance = []
    for one, gradient in zip(attention, gradients, strict=True):
        columns, others = one.T.tolist(), gradient.T.tolist()
        entries = [
            abs(sum(a * g for a, g in zip(column, other, strict=True))) for column in columns for other in others
        ]
        importance.append(sum(entries) / len(entries))
    return [value / sum(importance) for value in importance]


def block_matrices(kind: str, image: Tensor, target: int, version: str) -> list[Matrix]:
    model = build(kind)
    trace = run_slowly(model, image)
    gradients = attention_gradients(trace, target)
    found = []
    for place, block in enumerate(model.module.blocks):
        heads = trace.attention[place]
        span = range(len(heads[0]))
        if version == "head":
            shares, entries = head_shares(heads, gradients[place]), [head.tolist() for head in heads]
            weighed = list(zip(shares, entries, strict=True))
            found.append([[sum(share * head[i][j] for share, head in weighed) for j in span] for i in span])
        else:
            written = [block.attn.proj.weight @ value for value in trace.values[place].detach()]
            lengths = [
                float(written[token].norm()) / float(trace.entering[place][token].detach().norm())
                for token in span
            ]
            mean = mean_of_heads(heads)
            found.append([[mean[i][j] * lengths[j] for j in span] for i in span])
    return found


def twin(kind: str, image: Tensor, target: int, version: str, start: int, steps: int) -> Tensor:
    perception = identity(KINDS[kind].prefix + PATCHES)
    for matrix in block_matrices(kind, image, target, version)[start:]:
        perception = plus(perception, times(matrix, perception))
    feedback = integrated_rows(build(kind), image, target, steps)
    product = [[a * b for a, b in zip(*rows, strict=True)] for rows in zip(perception, feedback, strict=True)]
    return read_map(kind, product)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["head", "token"])
@pytest.mark.parametrize(("start", "steps"), [(None, 4), (0, 2), (3, 3)])
def test_maps_are_perception_times_feedback(kind: str, version: str, start: int | None, steps: int) -> None:
    images = pictures(2)
    options = {"version": version, "start_layer": start, "steps": steps}
    got = attribute_classes(
        build(kind), images, CLASSES, method=METHOD, options=options, native=True, batch_size=3
    ).double()
    assert float(got.max()) > 0
    for b, image in enumerate(images):
        for k in range(2):
            expected = twin(kind, image, int(CLASSES[b, k]), version, 1 if start is None else start, steps)
            torch.testing.assert_close(got[b, k], expected, rtol=1e-6, atol=1e-10)


def test_versions_differ() -> None:
    model, images, targets = build("class_token"), pictures(2), CLASSES[:, 0]
    head, token = (
        attribute(model, images, targets, method=METHOD, options={"version": version})
        for version in ("head", "token")
    )
    assert not torch.allclose(head / head.max(), token / token.max(), rtol=1e-2)


def test_more_classes_than_the_batch_may_hold_rows_for() -> None:
    model, images = build("pooled"), pictures(2)
    asked = torch.arange(5).expand(2, 5)
    together = attribute_classes(model, images, asked, method=METHOD, options={"steps": 2}, batch_size=2)
    for k in range(5):
        single = attribute(model, images, asked[:, k], method=METHOD, options={"steps": 2}, batch_size=8)
        torch.testing.assert_close(together[:, k], single, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("version", ["head", "token"])
def test_no_gradient_and_no_tokens_stay_finite(version: str) -> None:
    model = build("class_token")
    model.module.head.weight.zero_()
    maps = attribute(model, pictures(1), torch.tensor([2]), method=METHOD, options={"version": version})
    assert float(maps.abs().max()) == 0
    model = build("class_token")
    model.module.pos_embed.zero_()
    model.module.cls_token.zero_()
    model.module.patch_embed.proj.bias.zero_()
    blank = torch.zeros_like(pictures(1))
    options = {"version": version, "start_layer": 0}
    assert torch.isfinite(attribute(model, blank, torch.tensor([2]), method=METHOD, options=options)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "layer"}, r"bi_attention.version: expected one of head, token, got 'layer'"),
        ({"steps": 0}, r"bi_attention.steps: expected at least 2, got 0"),
        ({"start_layer": -1}, r"bi_attention.start_layer: expected a block from 0, got -1"),
        ({"start_layer": 9}, r"start_layer=9 is behind its last block: expected 0..3"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attribute(build("class_token"), pictures(1), torch.tensor([0]), method=METHOD, options=options)
