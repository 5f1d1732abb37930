"""Score-CAM: channels weighted by how the picture seen through them speaks for the class, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.cam.gradient_cam import (
    chosen_layer,
    most_varied_channels,
    readable_layer,
)
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.layers import as_map, captured
from xai_core.models import Classifier
from xai_core.registry import methods
from xai_core.replay import for_owners

Score = Literal["logit", "probability"]
Weights = Literal["softmax", "increase"]

# Larger passes are slower on a CPU: activations leave its cache, and fresh memory is faulted in page by page.
CPU_PASS = 8


@dataclass(frozen=True)
class ScoreCamOptions:
    """Options of Score-CAM; defaults are those of the paper's Algorithm 1.

    ``score``: what of the class is read, its ``logit`` or its ``probability``; ``weights``: the channels'
    increases over the baseline, put through a ``softmax`` over the channels or left as they are (``increase``);
    ``channels``: only that many channels of an image, those of largest variance over its cells (None: all);
    ``align_corners``: of the bilinear upsampling of masks; ``layer``: a module's name instead of the family's
    default.
    """

    layer: str | None = None
    score: Score = "logit"
    weights: Weights = "softmax"
    channels: int | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.score not in ("logit", "probability"):
            raise UsageError(f"score_cam.score: expected logit or probability, got {self.score!r}")
        if self.weights not in ("softmax", "increase"):
            raise UsageError(f"score_cam.weights: expected softmax or increase, got {self.weights!r}")
        if self.channels is not None and self.channels < 1:
            raise UsageError(f"score_cam.channels: expected at least 1 or none, got {self.channels}")


def several_cells(model: Classifier, options: Any) -> str | None:
    """A map of more than one cell, as a constant masks nothing."""
    if options.layer is None and model.final_size == (1, 1):
        return "its final map has a single cell at this input size, which masks nothing; name an earlier layer"
    return None


@methods.register(
    "score_cam",
    options=ScoreCamOptions,
    paper="Wang et al. 2020, Score-CAM",
    equation="definition 3, algorithm 1",
    needs=(readable_layer, several_cells),
    upsampling="bilinear",
    cost="a forward a channel that is not constant + 1, for all classes together",
    gradient_free=True,
)
def score_cam(
    model: Classifier, images: Tensor, classes: Tensor, options: ScoreCamOptions, batch_size: int
) -> Tensor:
    """Score-CAM: ReLU of the channels weighted by the class's score for the picture masked with each channel."""
    maps = _maps(model, images, chosen_layer(model, options))
    chosen = most_varied_channels(maps, options.channels)
    maps = maps.gather(1, chosen.view(*chosen.shape, 1, 1).expand(-1, -1, *maps.shape[2:]))
    increases = _increases(model, images, classes, maps, options, batch_size)
    weights = increases.softmax(dim=2) if options.weights == "softmax" else increases
    return torch.einsum("bchw,bkc->bkhw", maps, weights.to(maps.dtype)).relu()


def masks_of(maps: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Single-channel maps ``[P, 1, h, w]`` as masks ``[P, 1, H, W]``: upsampled, then from 0 to 1 each."""
    masks = F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    least = masks.amin(dim=(2, 3), keepdim=True)
    return (masks - least) / (masks.amax(dim=(2, 3), keepdim=True) - least)


def _maps(model: Classifier, images: Tensor, layer: str | None) -> Tensor:
    if layer is None:
        return wide(as_map(model, model.module.forward_features(images), "forward_features"))
    with captured(model, [layer]) as outputs:
        model(images)
    return wide(as_map(model, outputs[layer], layer))


def _increases(
    model: Classifier, images: Tensor, classes: Tensor, maps: Tensor, options: ScoreCamOptions, batch_size: int
) -> Tensor:
    """Scores of the masked pictures over that of the baseline, a picture of zeros: ``[B, K, C]``.

    A constant channel has no mask: what its normalisation leaves is the baseline, so it adds nothing and costs
    no pass.
    """
    pictures = _fast_layout(model, images)
    baseline = _scores(model, torch.zeros_like(pictures[:1]), options.score)[0]
    flat = maps.flatten(2)
    owners, channels = torch.nonzero(flat.amax(dim=2) > flat.amin(dim=2), as_tuple=True)

    def masked(rows: slice) -> Tensor:
        owner, channel = owners[rows], channels[rows]
        masks = masks_of(
            maps[owner, channel].unsqueeze(1), images.shape[-2:], align_corners=options.align_corners
        ).to(images.dtype)
        scores = _scores(model, for_owners(pictures, owner) * masks, options.score)
        return (scores - baseline).gather(1, classes[owner])

    size = min(batch_size, CPU_PASS) if images.device.type == "cpu" else batch_size
    found = run_batches(masked, len(owners), size)
    increases = baseline.new_zeros(*maps.shape[:2], classes.shape[1])
    if found:
        increases[owners, channels] = torch.cat(found)
    return increases.transpose(1, 2)


def _scores(model: Classifier, pictures: Tensor, score: Score) -> Tensor:
    logits = wide(model(pictures))
    return logits.softmax(dim=1) if score == "probability" else logits


def _fast_layout(model: Classifier, images: Tensor) -> Tensor:
    """Convolutions on the CPU are faster with the channels innermost; later layers keep the input's layout."""
    if model.family == "cnn" and images.device.type == "cpu":
        return images.contiguous(memory_format=torch.channels_last)
    return images
