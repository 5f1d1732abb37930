"""Running only the part of a network behind a layer, many times, on changed outputs of that layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
    record = _Record(layer, len(images))
    with record.watching(model):
        model(images)
    if record.calls[layer] != 1 or record.activation is None:
        raise UsageError(
            f"layer {layer!r}: expected a module that runs once in a pass, got {record.calls[layer]} runs"
        )
    activation, finished = record.activation, record.finished()
    modules = dict(model.module.named_modules())

    def run(outputs: Tensor, owners: Tensor) -> Tensor:
        answers = {modules[name]: for_owners(result, owners) for name, result in finished.items()}
        with _answering({**answers, modules[layer]: outputs}):
            return model(for_owners(images, owners))

    return Behind(layer, activation, run)


def for_owners(results: Tensor, owners: Tensor) -> Tensor:
    """Each owner's row of a batch's results ``[B, ...]``; no copies where one image owns all, as it often does."""
    first = int(owners[0])
    if bool((owners == first).all()):
        return results[first : first + 1].expand(len(owners), *results.shape[1:])
    return results[owners]


@dataclass
class _Record:
    """What had finished when a layer was reached, by the modules' names; what is in a finished one left out."""

    layer: str
    batch: int
    activation: Tensor | None = None
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

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.calls[name] += 1
            if name == self.layer:
                self.activation = output
            elif self.activation is None and self._of_images(inputs[:1]) and self._of_images((output,)):
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
