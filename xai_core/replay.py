"""Running only a part of a network, many times, on changed outputs of the layer where the part begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.errors import UsageError
from xai_core.models import Classifier


@dataclass(frozen=True)
class Behind:
    """A layer's output for a batch, and the network behind it.

    ``run`` takes outputs to put in the layer's place ``[P, ...]`` and, for each, the position in the batch of the
    image it belongs to ``[P]``; it gives the logits ``[P, C]``.
    """

    layer: str
    activation: Tensor
    run: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Between:
    """The outputs of two layers for a batch of images, and the network between them.

    ``run`` takes outputs to put in the source's place ``[n, ...]`` and, for each, the position in the batch of the
    image it belongs to ``[n]``; it gives what the target layer makes of them ``[n, ...]``, differentiably, and
    runs nothing behind it. ``target`` None stands for the logits. ``reached`` is the target's output for them.
    """

    source: str
    target: str | None
    activation: Tensor
    reached: Tensor
    run: Callable[[Tensor, Tensor], Tensor]


def network_behind(model: Classifier, images: Tensor, layer: str | None) -> Behind:
    """The part of a network behind a layer; ``layer`` None is timm's ``forward_features``.

    One full pass is made here. Later passes take what ran before the layer from it: every module that had finished
    by then, and whose result nobody overwrote in place, answers with its result for the image.

    Raises:
        UsageError: the layer does not run exactly once.
    """
    if layer is None:
        features = model.module.forward_features(images)
        return Behind("forward_features", features, lambda outputs, _images: model.module.forward_head(outputs))
    (record,), _ = _recorded(model, images, [layer], [])
    return Behind(layer, _activation(record), _replay(model, images, record, None))


def network_between(model: Classifier, images: Tensor, source: str, target: str | None) -> Between:
    """The part of a network between two layers (iERF, section VI-B1), as :func:`networks_between` gives it."""
    return networks_between(model, images, [(source, target)])[0]


def networks_between(model: Classifier, images: Tensor, pairs: Sequence[tuple[str, str | None]]) -> list[Between]:
    """The parts of a network between pairs of layers, isolated without a copy of its weights.

    All of them come from one full pass; later passes work as for :func:`network_behind` and end at the target.

    Raises:
        UsageError: a layer does not run exactly once, is overwritten in place by the one behind it, or the target
            comes before the source or does not depend on it.
    """
    sources = list(dict.fromkeys(source for source, _ in pairs))
    targets = list(dict.fromkeys(target for _, target in pairs if target is not None))
    records, logits = _recorded(model, images, sources, targets)
    by_source = dict(zip(sources, records, strict=True))
    return [_between(model, images, by_source[source], target, logits) for source, target in pairs]


def for_owners(results: Tensor, owners: Tensor) -> Tensor:
    """Each owner's row of a batch's results ``[B, ...]``; no copies where one image owns all, as it often does."""
    first = int(owners[0])
    if bool((owners == first).all()):
        return results[first : first + 1].expand(len(owners), *results.shape[1:])
    return results[owners]


def _between(model: Classifier, images: Tensor, record: _Record, target: str | None, logits: Tensor) -> Between:
    activation, reached = _activation(record), logits if target is None else _reached(record, target)
    for layer in (record.layer, *([target] if target is not None else [])):
        record.refuse_overwritten(layer)
    run = _replay(model, images, record, target)
    with torch.enable_grad():
        one = run(activation[:1].detach().requires_grad_(True), torch.zeros(1, dtype=torch.long))
    if not one.requires_grad:
        raise UsageError(
            f"layer {target!r}: expected one that depends on {record.layer!r}, got one that does not; "
            "name a layer on the way from it to the logits"
        )
    return Between(record.layer, target, activation, reached, run)


def _recorded(
    model: Classifier, images: Tensor, sources: Sequence[str], targets: Sequence[str]
) -> tuple[list[_Record], Tensor]:
    """One pass with a record for each source, and its logits."""
    known = {*sources, *targets}
    records = [_Record(source, len(images), known) for source in sources]
    for name in known:
        model.layer(name)
    with ExitStack() as stack:
        for record in records:
            stack.enter_context(record.watching(model))
        return records, model(images)


def _activation(record: _Record) -> Tensor:
    record.refuse_other_runs(record.layer)
    return record.outputs[record.layer][0]


def _reached(record: _Record, target: str) -> Tensor:
    record.refuse_other_runs(target)
    if target == record.layer or target in record.before:
        raise UsageError(
            f"layer {target!r}: expected a layer behind {record.layer!r}, got one that comes before it; "
            "swap the two"
        )
    return record.outputs[target][0]


def _replay(
    model: Classifier, images: Tensor, record: _Record, target: str | None
) -> Callable[[Tensor, Tensor], Tensor]:
    finished = record.finished()
    modules = dict(model.module.named_modules())
    source = modules[record.layer]

    def run(outputs: Tensor, owners: Tensor) -> Tensor:
        answers = {modules[name]: for_owners(result, owners) for name, result in finished.items()}
        with _answering({**answers, source: outputs}), _last_word(source, outputs):
            pictures = for_owners(images, owners)
            return model(pictures) if target is None else _until(modules[target], model, pictures)

    return run


class _Arrived(Exception):  # noqa: N818
    """Not an error: the target layer's output, on its way out of a pass that ends there."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _until(target: nn.Module, model: Classifier, images: Tensor) -> Tensor:
    """The target's output, the pass given up behind it."""

    def stop(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        raise _Arrived(output)

    handle = target.register_forward_hook(stop)
    try:
        model(images)
    except _Arrived as arrived:
        return arrived.output
    finally:
        handle.remove()
    raise RuntimeError("the target layer did not run in this pass, though it ran in the first one")


@dataclass
class _Record:
    """What had finished when a layer was reached, by the modules' names; what is in a finished one left out.

    ``outputs`` are those of ``known`` layers, with the version that they had when they came out; ``before`` the
    modules that had run when the layer was reached.
    """

    layer: str
    batch: int
    known: set[str]
    outputs: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    before: frozenset[str] = frozenset()
    results: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def watching(self, model: Classifier) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in model.module.named_modules() if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finished(self) -> dict[str, Tensor]:
        """Results that a later pass can take over: of one call alone, and still what the module returned."""
        return {
            name: result
            for name, (result, version) in self.results.items()
            if self.calls[name] == 1 and result._version == version
        }

    def refuse_other_runs(self, layer: str) -> None:
        if self.calls[layer] != 1:
            raise UsageError(
                f"layer {layer!r}: expected a module that runs once in a pass, got {self.calls[layer]} runs"
            )
        output = self.outputs[layer][0]
        if not isinstance(output, Tensor):
            raise UsageError(
                f"layer {layer!r}: expected one tensor as its output, got {type(output).__name__}; "
                "name a layer inside it"
            )

    def refuse_overwritten(self, layer: str) -> None:
        output, version = self.outputs[layer]
        if output._version != version:
            raise UsageError(
                f"layer {layer!r}: expected an output that later layers leave as it is, got one that the next "
                "module overwrites in place; name that next module (often the activation)"
            )

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if name == self.layer and not self.calls[name]:
                self.before = frozenset(self.calls)
            self.calls[name] += 1
            if name in self.known:
                self.outputs[name] = (output, getattr(output, "_version", 0))
            if not self.calls[self.layer] and self._of_images(inputs[:1]) and self._of_images((output,)):
                for inner in [known for known in self.results if known.startswith(f"{name}.")]:
                    del self.results[inner]
                self.results[name] = (output, output._version)

        return after

    def _of_images(self, values: tuple[Any, ...]) -> bool:
        """Whether these are tensors with a row for each image: tables and windows are computed again."""
        return bool(values) and all(
            isinstance(value, Tensor) and value.ndim > 1 and len(value) == self.batch for value in values
        )


@contextmanager
def _answering(results: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Modules that return these results instead of computing anything, inside the block."""
    own = {module: module.__dict__.get("forward") for module in results}
    try:
        for module, result in results.items():
            module.forward = lambda *_inputs, _result=result, **_keywords: _result
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def _last_word(module: nn.Module, result: Tensor) -> Iterator[None]:
    """A module whose output is the result whatever the hooks on it (those of propagation rules) make of it."""
    handle = module.register_forward_hook(lambda *_call: result)
    try:
        yield
    finally:
        handle.remove()
