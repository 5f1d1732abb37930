"""Reading activations, and gradients with respect to them, out of a frozen classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.per_model import once_per_model
from xai_core.precision import own_modes

Stage = Literal["high", "low"]


@once_per_model
def _problems(_model: Classifier) -> dict[str, str | None]:
    """What is wrong with a model's layers, as far as they were looked at: filled as they are."""
    return {}


@contextmanager
def captured(
    model: Classifier, layers: Sequence[str], *, with_gradient: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of named layers during the forward passes inside the block.

    With ``with_gradient`` the first layer reached becomes a leaf of the graph: nothing before it is
    recorded, so the backward pass costs only the part of the network behind it.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"layer {name!r}: expected one tensor as its output, got {type(output).__name__}; "
                    "name a layer inside it"
                )
            if with_gradient and not output.requires_grad:
                output = output.detach().requires_grad_(True)
            outputs[name] = output
            return output

        return hook

    handles = [model.layer(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def activations_and_gradients(
    model: Classifier, images: Tensor, targets: Tensor, layers: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of layers and the gradients of the target logits with respect to them, in one pass.

    Args:
        images: ``[B, 3, H, W]``; targets: ``[B]`` class indices.

    Returns:
        Two dicts by layer name; tensors in the layer's own layout. A layer that does not influence the
        logit has a gradient of zeros.
    """
    with torch.enable_grad(), captured(model, layers, with_gradient=True) as outputs:
        scores = model(images).gather(1, targets.view(-1, 1)).sum()
        reached = [outputs[name] for name in layers]
        gradients = torch.autograd.grad(scores, reached, allow_unused=True, materialize_grads=True)
    return (
        {name: output.detach() for name, output in zip(layers, reached, strict=True)},
        dict(zip(layers, gradients, strict=True)),
    )


def per_class(
    logits: Tensor,
    classes: Tensor,
    tensors: Sequence[Tensor],
    reduce: Callable[[Sequence[Tensor]], Tensor],
    *,
    create_graph: bool = False,
) -> Tensor:
    """What ``reduce`` makes of each class's gradients: one backward a class through one graph.

    The backwards run one after the other, each over the whole batch: a vectorised backward of all classes holds
    K times the memory, and measured slower on convolutions (docs/benchmarks.md).

    Args:
        logits: ``[B, C]`` with their graph; classes: ``[B, K]`` class indices.
        tensors: what the gradients are taken with respect to; one that feeds no logit has a gradient of zeros.
        reduce: called with one class's gradients, shaped as ``tensors``; gives ``[B, ...]``.
        create_graph: whether the gradients can be differentiated in their turn.

    Returns:
        ``[B, K, ...]``.
    """
    count = classes.shape[1]
    reduced = []
    for position in range(count):
        with torch.enable_grad():
            score = logits.gather(1, classes[:, position : position + 1]).sum()
        last = position == count - 1
        gradients = torch.autograd.grad(
            score,
            tensors,
            retain_graph=create_graph or not last,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        reduced.append(reduce(gradients))
    return torch.stack(reduced, dim=1)


def as_map(model: Classifier, activation: Tensor, layer: str) -> Tensor:
    """A layer's output as a map ``[B, C, h, w]``; prefix tokens are left out.

    Raises:
        UsageError: the output has no spatial positions.
    """
    if activation.ndim == 4:
        channels_last = getattr(model.module, "output_fmt", "NCHW") == "NHWC"
        return activation.permute(0, 3, 1, 2) if channels_last else activation
    if activation.ndim == 3:
        rows, columns = model.token_grid
        tokens = activation[:, model.num_prefix_tokens :]
        if model.family == "vit" and tokens.shape[1] == rows * columns:
            return tokens.transpose(1, 2).unflatten(2, (rows, columns))
    raise UsageError(
        f"layer {layer!r}: expected an output with spatial positions ([B, C, h, w], or [B, tokens, C] with "
        f"{model.spec.name}'s token grid), got shape {tuple(activation.shape)}; name a layer before the pooling"
    )


def stage_layer(model: Classifier, reduction: int) -> str:
    """The last layer of a network of maps whose features have a ``reduction``-th of the input's side.

    Raises:
        UsageError: timm knows of no such stage.
    """
    stages = [entry for entry in getattr(model.module, "feature_info", None) or [] if entry.get("module")]
    found = [entry["module"] for entry in stages if entry["reduction"] == reduction]
    if not found:
        known = ", ".join(str(entry["reduction"]) for entry in stages) or "none"
        raise UsageError(
            f"{model.spec.name}: expected a stage at 1/{reduction} of the input's side, got stages at 1/ {known}"
        )
    return str(found[-1])


def default_cam_layer(model: Classifier, stage: Stage = "high") -> str | None:
    """The layer that CAM methods read unless told otherwise.

    Maps: ``high`` is the last feature map before pooling (None stands for timm's ``forward_features``), ``low``
    the last layer of the first stage at a quarter of the input's side or less. Tokens: the first normalisation of
    the last block, because what the last block adds to a patch token no longer reaches a head that reads the
    class token; ``low`` is that of the block a third of the way up.

    Raises:
        UsageError: the model has no such layer.
    """
    if model.family == "cnn" and stage == "high":
        return None
    stages = [entry for entry in getattr(model.module, "feature_info", None) or [] if entry.get("module")]
    if model.family == "cnn":
        stages = [entry for entry in stages if entry["reduction"] >= 4]
    if not stages:
        raise UsageError(
            f"{model.spec.name} does not say which stages it has; name a layer with the option 'layer'"
        )
    if model.family == "cnn":
        return str(stages[0]["module"])
    block = stages[-1 if stage == "high" else len(stages) // 3]["module"]
    layer = f"{block}.norm1"
    if layer not in dict(model.module.named_modules()):
        raise UsageError(f"{model.spec.name} has no layer {layer!r}; name one with the option 'layer'")
    return layer


def layer_problem(model: Classifier, layer: str) -> str | None:
    """Why a layer cannot be read as a map that explains logits, by probing it with random images; or None.

    It is unknown, never runs, has no spatial positions, is overwritten in place, or its positions influence no
    logit although the image does. The message names a layer to use instead. Each layer of a model is probed once.
    """
    known = _problems(model)
    if layer not in known:
        try:
            with own_modes("fp32", model.device):
                _probe_layer(model, layer)
            known[layer] = None
        except UsageError as error:
            known[layer] = str(error)
    return known[layer]


def _probe_layer(model: Classifier, layer: str) -> None:
    """Refuses a layer that cannot be read; no gradients are needed, so that methods without any stay so."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 3, *model.input_size, generator=generator).to(model.device, model.dtype)
    versions: list[int] = []
    watch = model.layer(layer).register_forward_hook(
        lambda _module, _inputs, output: versions.append(getattr(output, "_version", 0))
    )
    try:
        with captured(model, [layer]) as outputs:
            logits = model(images[0])
    finally:
        watch.remove()
    if layer not in outputs:
        raise UsageError(
            f"layer {layer!r}: expected a module that runs in the forward pass of {model.spec.name}, "
            f"got one that does not; use {_usable_layer(model)}"
        )
    if outputs[layer]._version != versions[-1]:
        raise UsageError(
            f"layer {layer!r}: expected an output that later layers leave as it is, got one that the next "
            "module overwrites in place; name that next module (often the activation)"
        )
    _positions_of_one_image(model, outputs[layer], layer)
    if torch.equal(_logits_of_noise(model, images[0], layer), logits) and not torch.equal(
        model(images[1]), logits
    ):
        raise UsageError(
            f"layer {layer!r}: expected positions that influence the logits of {model.spec.name}, got none "
            "that does (a head that reads the class token no longer sees what becomes of the patch "
            f"tokens after the last attention); use {_usable_layer(model)}"
        )


def _logits_of_noise(model: Classifier, image: Tensor, layer: str) -> Tensor:
    """Logits when the layer's map, but no prefix token, is noise of its own size."""

    def disturb(_module: object, _inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        values = as_map(model, changed, layer)
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
        values += noise * values.abs().amax()
        return changed

    handle = model.layer(layer).register_forward_hook(disturb)
    try:
        return model(image)
    finally:
        handle.remove()


def _positions_of_one_image(model: Classifier, activation: Tensor, layer: str) -> None:
    """Refuses what is no map of one image: vectors, a pooled cell, attention windows, attention heads."""
    try:
        size = tuple(as_map(model, activation, layer).shape[-2:])
    except UsageError as error:
        raise UsageError(f"{error}, such as {_usable_layer(model)}") from None
    expected = model.token_grid if model.family == "vit" else size
    if activation.shape[0] != 1 or size != expected or size == (1, 1):
        raise UsageError(
            f"layer {layer!r}: expected the spatial positions of one image, got an output of shape "
            f"{tuple(activation.shape)}; use {_usable_layer(model)}"
        )


def _usable_layer(model: Classifier) -> str:
    """The last layer known to work, quoted for an error message.

    On a ViT the last block's first norm is the last place where patch tokens still reach the class token.
    """
    stages: list[dict[str, Any]] = getattr(model.module, "feature_info", None) or []
    if not stages:
        return "an earlier layer"
    last = stages[-1]["module"]
    norm = f"{last}.norm1"
    return repr(norm if model.family == "vit" and norm in dict(model.module.named_modules()) else last)
