"""A layer's output as one list of feature vectors an image, and back into the layer's own layout."""

from __future__ import annotations

from torch import Tensor

from xai_core.layers import as_map
from xai_core.models import Classifier

# On the CPU torch 2.15 silently gives a wrong gradient of a batch normalisation in evaluation mode where the map
# of one image, or the gradient that arrives there, has the strides of transposed vectors: both are laid out
# anew here.


def to_vectors(model: Classifier, activation: Tensor, layer: str) -> Tensor:
    """Feature vectors ``[B, P, C]`` of a layer's output (iERF, section III-A; tokens of a ViT: III-D).

    A map gives its positions row by row. Tokens come as they are: prefix tokens first, then the patches.

    Raises:
        UsageError: the output has no spatial positions.
    """
    positions = as_map(model, activation, layer)
    if activation.ndim == 3:
        return activation
    if positions.requires_grad:
        positions = positions.view_as(positions)
        positions.register_hook(Tensor.contiguous)
    return positions.flatten(2).transpose(1, 2)


def from_vectors(model: Classifier, vectors: Tensor, like: Tensor) -> Tensor:
    """Feature vectors ``[B, P, C]`` in the layout of the layer's output ``like``, ``[b, ...]``."""
    if like.ndim == 3:
        return vectors
    if getattr(model.module, "output_fmt", "NCHW") == "NHWC":
        return vectors.unflatten(1, like.shape[1:3])
    return vectors.transpose(1, 2).unflatten(2, like.shape[2:]).contiguous()


def prefix(model: Classifier, activation: Tensor) -> int:
    """How many of a layer's vectors are no positions of the image: class, distillation and register tokens."""
    return model.num_prefix_tokens if activation.ndim == 3 else 0
