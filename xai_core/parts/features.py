"""One feature vector per position: patch tokens of a transformer, a feature map of a convolutional net."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xai_core.batching import run_batches
from xai_core.layers import as_map, captured
from xai_core.models import Classifier

# The last map of an ImageNet network is 7 x 7: a dozen parts out of 49 positions are patchwork. Fourteen
# positions a side is what a transformer with patches of 16 pixels has.
FEWEST_POSITIONS = 14


@torch.no_grad()
def position_features(
    model: Classifier, images: Tensor, backbone: Classifier | None = None, *, batch_size: int = 32
) -> Tensor:
    """Feature vectors to cluster into parts: the "intermediate visual tokens" of KL-Hessian, section 4.1.

    Tokens: the patch tokens of timm's ``forward_features``, without prefix tokens. Maps: the deepest of the
    model's stages that still has 14 x 14 positions; where none has, the one with the most.

    Args:
        model: the classifier whose inputs the images are.
        images: ``[B, 3, H, W]``, normalised for ``model``.
        backbone: another network to take the features from; it sees the pictures in its own size and
            normalisation.
        batch_size: images in one forward pass.

    Returns:
        float32 ``[B, rows, columns, D]`` of length 1, on the device of the network that made them.
    """
    extractor = backbone or model
    images = images.to(extractor.device)

    def features(rows: slice) -> Tensor:
        chunk = images[rows] if backbone is None else _translate(images[rows], model, backbone)
        return _feature_map(extractor, chunk)

    maps = run_batches(features, len(images), batch_size)
    return functional.normalize(torch.cat(maps).float().permute(0, 2, 3, 1), dim=-1)


def _translate(images: Tensor, model: Classifier, backbone: Classifier) -> Tensor:
    pictures = model.denormalise(images.float())
    resized = functional.interpolate(
        pictures, backbone.input_size, mode="bilinear", align_corners=False, antialias=True
    )
    return backbone.normalise(resized)


def _feature_map(model: Classifier, images: Tensor) -> Tensor:
    images = images.to(model.dtype)
    if model.family == "vit":
        return as_map(model, model.module.forward_features(images), "forward_features")
    stages = [stage["module"] for stage in getattr(model.module, "feature_info", [])]
    with captured(model, stages) as outputs:
        final = model.module.forward_features(images)
    maps = [as_map(model, outputs[stage], stage) for stage in stages if stage in outputs]
    return _deepest_fine_map([*maps, as_map(model, final, "forward_features")])


def _deepest_fine_map(maps: list[Tensor]) -> Tensor:
    fine = [one for one in maps if min(one.shape[-2:]) >= FEWEST_POSITIONS]
    return fine[-1] if fine else max(maps, key=lambda one: one.shape[-2:].numel())
