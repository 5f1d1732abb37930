"""Reading activations, and gradients with respect to them, out of a frozen classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.models import Classifier


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
) -> Tensor:
    """What ``reduce`` makes of each class's gradients: one backward a class through one graph.

    The backwards run one after the other, each over the whole batch: a vectorised backward of all classes holds
    K times the memory, and measured slower on convolutions (docs/benchmarks.md).

    Args:
        logits: ``[B, C]`` with their graph; classes: ``[B, K]`` class indices.
        tensors: what the gradients are taken with respect to; one that feeds no logit has a gradient of zeros.
        reduce: called with one class's gradients, shaped as ``tensors``; gives ``[B, ...]``.

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
            score, tensors, retain_graph=not last, allow_unused=True, materialize_grads=True
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


def default_cam_layer(model: Classifier) -> str | None:
    """The layer that CAM methods read unless told otherwise.

    Maps: the last feature map before pooling (None stands for timm's ``forward_features``). Tokens: the
    first normalisation of the last block, because what the last block adds to a patch token no longer
    reaches a head that reads the class token.
    """
    if model.family == "cnn":
        return None
    last_block = model.module.feature_info[-1]["module"]
    layer = f"{last_block}.norm1"
    if layer not in dict(model.module.named_modules()):
        raise UsageError(f"{model.spec.name} has no layer {layer!r}; name one with the option 'layer'")
    return layer
