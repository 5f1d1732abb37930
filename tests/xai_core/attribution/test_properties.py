"""What every registered method must hold, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.xai_core.tiny import CLASSES, SIZE, pictures, quarters, tiny_cnn, tiny_relu_cnn, tiny_vit
from xai_core.attribution import attribute, attribute_classes, fit_method
from xai_core.attribution.interface import misfit
from xai_core.coverage import SMALL_BUDGETS
from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.registry import MethodEntry, methods
from xai_core.training import kinds_of_method

MODELS: dict[str, Callable[[], Classifier]] = {"vit": tiny_vit, "silu_cnn": tiny_cnn, "relu_cnn": tiny_relu_cnn}


def options_for(entry: MethodEntry) -> Any:
    return entry.options(**SMALL_BUDGETS.get(entry.name, {}))


@cache
def fitting() -> tuple[tuple[str, str], ...]:
    """Every method with every tiny model that it fits."""
    built = {name: build() for name, build in MODELS.items()}
    return tuple(
        (entry.name, name)
        for entry in methods
        for name, model in built.items()
        if misfit(entry, model, options_for(entry)) is None
    )


CASES = fitting()
PIXEL_CASES = [(method, model) for method, model in CASES if methods.get(method).output == "pixels"]
every_method = pytest.mark.parametrize(("method", "model"), CASES)


class Explained:
    """One method on one tiny model in float32, fitted where it has to be."""

    def __init__(self, method: str, model: str) -> None:
        self.entry = methods.get(method)
        self.model = MODELS[model]()
        self.model.module.float()
        self.images, self.targets = pictures(3)
        self.images = self.images.float()
        self.shared: dict[str, Any] = {"method": method, "options": options_for(self.entry)}
        if self.entry.fit:
            self.shared["fitted"] = fit_method(
                self.model, self.images, self.targets, **self.shared, parts=quarters(3)
            )

    def __call__(self, images: Tensor | None = None, **more: Any) -> Tensor:
        images = self.images if images is None else images
        targets = more.pop("targets", self.targets[: len(images)])
        return attribute(self.model, images, targets, parts=quarters(len(images)), **self.shared, **more)


def test_every_method_fits_one_of_the_tiny_models() -> None:
    # Those that are trained have properties' tests of their own, with the files that they need.
    assert {method for method, _ in CASES} == {name for name in methods.names() if not kinds_of_method(name)}


# Differences of nearly equal gradients: float32 rounding, which kernels do otherwise for other batches, is divided
# by the small step between them.
ROUNDING = {"kl_hessian": 1e-4}


@every_method
def test_batch_size_and_neighbours_change_nothing(method: str, model: str) -> None:
    explain = Explained(method, model)
    together = explain(batch_size=8)
    assert together.shape == (3, SIZE, SIZE)
    assert together.dtype == torch.float32
    assert torch.isfinite(together).all()
    scale = together.abs().amax().clamp(min=1e-30)
    tolerance = ROUNDING.get(method, 1e-5)
    torch.testing.assert_close(explain(batch_size=1) / scale, together / scale, rtol=0, atol=tolerance)
    alone = explain(explain.images[:1], batch_size=8)
    torch.testing.assert_close(alone / scale, together[:1] / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "model"), PIXEL_CASES)
def test_several_classes_at_once_are_the_classes_one_by_one(method: str, model: str) -> None:
    explain = Explained(method, model)
    classes = torch.tensor([[0, 3], [1, 4], [2, 0]])
    together = attribute_classes(explain.model, explain.images, classes, batch_size=4, **explain.shared)
    scale = together.abs().amax().clamp(min=1e-30)
    for column in range(2):
        single = explain(targets=classes[:, column])
        torch.testing.assert_close(together[:, column] / scale, single / scale, rtol=0, atol=1e-5)
    differs = not torch.allclose(together[:, 0] / scale, together[:, 1] / scale, atol=1e-6)
    assert differs is explain.entry.class_specific


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, autocast], ids=lambda mode: mode.__name__)
def test_the_callers_modes_have_no_effect(method: str, model: str, mode: Callable[[], Any]) -> None:
    explain = Explained(method, model)
    usual = explain()
    with mode():
        within = explain(explain.images.clone())
    assert torch.equal(within.clone(), usual)
    assert not usual.requires_grad
    assert not explain.images.requires_grad


@every_method
def test_the_model_is_left_as_it_was(method: str, model: str) -> None:
    explain = Explained(method, model)
    before = state_of(explain.model.module)
    explain()
    assert state_of(explain.model.module) == before


@every_method
@pytest.mark.parametrize("at", ["first", "last"])
def test_the_model_is_left_as_it_was_by_a_failure(method: str, model: str, at: str) -> None:
    explain = Explained(method, model)
    before = state_of(explain.model.module)
    explain()  # what is found out once about a model is known from here on
    passes = len(heads_passed(explain, None))
    with pytest.raises(RuntimeError, match="the power is gone"):
        heads_passed(explain, 1 if at == "first" else passes)
    assert state_of(explain.model.module) == before


def heads_passed(explain: Explained, fail_at: int | None) -> list[int]:
    """The passes through the model's head while it is explained; the one of that number fails."""
    passed: list[int] = []

    def count(*_: object) -> None:
        passed.append(1)
        if len(passed) == fail_at:
            raise RuntimeError("the power is gone")

    handle = head_of(explain.model).register_forward_hook(count)
    try:
        explain(batch_size=1)
    finally:
        handle.remove()
    return passed


def head_of(model: Classifier) -> torch.nn.Module:
    return model.module.get_submodule("head" if model.family == "vit" else "fc")


def state_of(module: torch.nn.Module) -> dict[str, Any]:
    """Everything of a module that a method could leave changed: hooks, modes, flags, weights."""
    return {
        name: (
            sorted(
                (key, repr(value))
                for key, value in vars(child).items()
                if not key.startswith("_") and not isinstance(value, Tensor)
            ),
            [len(hooks) for key, hooks in vars(child).items() if key.endswith("_hooks") and hooks is not None],
            "forward" in vars(child),
            [type(one).__name__ for one in child.children()],
            [
                (key, tensor.requires_grad, tensor.grad is None, float(tensor.double().sum()), id(tensor))
                for key, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
            ],
        )
        for name, child in module.named_modules()
    }


@every_method
def test_blank_images_and_dead_heads_give_finite_maps(method: str, model: str) -> None:
    explain = Explained(method, model)
    assert torch.isfinite(explain(torch.zeros(1, 3, SIZE, SIZE))).all()
    head = head_of(explain.model)
    head.weight.zero_()
    assert torch.isfinite(explain()).all()


@every_method
def test_bf16_gives_finite_maps_or_is_refused(method: str, model: str) -> None:
    explain = Explained(method, model)
    if explain.entry.half_precision:
        maps = explain(precision="bf16")
        assert torch.isfinite(maps).all()
        assert maps.dtype == torch.float32
    else:
        with pytest.raises(UsageError, match="bf16"):
            explain(precision="bf16")


@pytest.mark.parametrize("method", [method for method, model in CASES if model == "vit"])
def test_fused_attention_is_as_stated(method: str) -> None:
    explain = Explained(method, "vit")
    attention = explain.model.module.blocks[1].attn
    assert attention.fused_attn
    seen = set()
    handle = attention.register_forward_pre_hook(lambda *_: seen.add(attention.fused_attn))
    fused = explain()
    handle.remove()
    expected = {"kept": {True}, "off": {False}}[explain.entry.fused_attention]
    assert seen == expected or seen == {True, False}
    assert seen >= expected
    for block in explain.model.module.blocks:
        block.attn.fused_attn = False
    scale = fused.abs().amax().clamp(min=1e-30)
    torch.testing.assert_close(explain() / scale, fused / scale, rtol=0, atol=1e-3)


@every_method
def test_gradients_are_recorded_only_where_stated(method: str, model: str) -> None:
    explain = Explained(method, model)
    head = head_of(explain.model)
    recorded = []
    handle = head.register_forward_hook(lambda _m, _i, output: recorded.append(output.requires_grad))
    explain()
    handle.remove()
    if explain.entry.gradient_free:
        assert not any(recorded)
    else:
        assert any(recorded)


@every_method
def test_bad_requests_are_refused(method: str, model: str) -> None:
    explain = Explained(method, model)
    with pytest.raises(UsageError, match=rf"targets in 0\.\.{CLASSES - 1}"):
        explain(targets=torch.tensor([0, 1, CLASSES]))
    broken = explain.images.clone()
    broken[1, 0, 3, 4] = torch.nan
    with pytest.raises(NotFinite, match="NaN or infinity in image 1"):
        explain(broken)
