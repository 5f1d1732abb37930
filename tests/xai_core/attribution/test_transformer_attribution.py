"""Transition attention maps against a Markov chain walked state by state, and the bounds of their passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.xai_core.attribution.slow_vit import (
    KINDS,
    PATCHES,
    Matrix,
    build,
    integrated_rows,
    mean_of_heads,
    pictures,
    read_map,
    run_slowly,
)
from xai_core.attribution import attribute, attribute_classes
from xai_core.errors import UsageError

CLASSES = torch.tensor([[0, 3], [4, 1]])
METHOD = "transformer_attribution"


def twin(kind: str, image: Tensor, target: int, start: int, steps: int) -> Tensor:
    model = build(kind)
    blocks = [mean_of_heads(heads) for heads in run_slowly(model, image).attention]
    feedback = integrated_rows(model, image, target, steps)
    span = range(len(feedback))
    found: Matrix = [[0.0 for _ in span] for _ in span]
    for row in KINDS[kind].read:
        state = list(blocks[-1][row])
        for block in range(len(blocks) - 2, start - 1, -1):
            moved = [sum(state[here] * blocks[block][here][there] for here in span) for there in span]
            state = [stayed + came for stayed, came in zip(state, moved, strict=True)]
        found[row] = [state[token] * feedback[row][token] for token in span]
    return read_map(kind, found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "steps"), [(None, 5), (0, 3), (3, 2)])
def test_maps_are_chain_times_integrated_gradients(kind: str, start: int | None, steps: int) -> None:
    images = pictures(2)
    got = attribute_classes(
        build(kind), images, CLASSES, method=METHOD, options={"start_layer": start, "steps": steps}, native=True
    ).double()
    assert float(got.max()) > 0
    for b, image in enumerate(images):
        for k in range(2):
            expected = twin(kind, image, int(CLASSES[b, k]), 1 if start is None else start, steps)
            torch.testing.assert_close(got[b, k], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("kind", "classes"), [("class_token", 5), ("pooled", 5)])
@pytest.mark.parametrize("method", [METHOD, "bi_attention"])
def test_batch_size_bounds_every_pass_and_changes_nothing(kind: str, classes: int, method: str) -> None:
    model, images = build(kind), pictures(3)
    asked = torch.arange(classes).expand(3, classes)
    options = {"steps": 4}
    whole = attribute_classes(model, images, asked, method=method, options=options, batch_size=64)
    for batch_size in (1, 3, 5):
        passed: list[int] = []
        handle = model.module.patch_embed.register_forward_pre_hook(
            lambda _, inputs, passed=passed: passed.append(len(inputs[0]))
        )
        cut = attribute_classes(model, images, asked, method=method, options=options, batch_size=batch_size)
        handle.remove()
        assert max(passed) <= batch_size
        if kind == "class_token":  # one row a class is held, so that all classes share each picture's passes
            assert sum(passed) == 3 * (1 + 4)
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", [METHOD, "bi_attention"])
def test_path_pictures_that_do_not_fit_are_halved_and_counted_once(method: str) -> None:
    model, images = build("class_token"), pictures(2)
    usual = attribute(model, images, CLASSES[:, 0], method=method, options={"steps": 6})

    def refuse(_: object, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 3:
            raise MemoryError

    handle = model.module.head.register_forward_pre_hook(refuse)
    halved = attribute(model, images, CLASSES[:, 0], method=method, options={"steps": 6})
    handle.remove()
    torch.testing.assert_close(halved, usual, rtol=1e-6, atol=1e-12)


def test_without_gradient_there_is_nothing_to_show() -> None:
    model = build("pooled")
    model.module.head.weight.zero_()
    maps = attribute(model, pictures(1), torch.tensor([2]), method=METHOD)
    assert maps.shape[1] * maps.shape[2] == 64 * PATCHES
    assert float(maps.abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, r"transformer_attribution.steps: expected at least 2, got 1"),
        ({"start_layer": -2}, r"transformer_attribution.start_layer: expected a block from 0, got -2"),
        ({"start_layer": 4}, r"start_layer=4 is behind its last block: expected 0..3"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attribute(build("class_token"), pictures(1), torch.tensor([0]), method=METHOD, options=options)
