"""Ablation-CAM: channels weighted by what the class's logit loses without them, without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.arithmetic import wide
from xai_core.attribution.cam.gradient_cam import (
    chosen_layer,
    most_varied_channels,
    readable_layer,
)
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.layers import as_map
from xai_core.models import Classifier
from xai_core.registry import methods
from xai_core.replay import network_behind


@dataclass(frozen=True)
class AblationCamOptions:
    """Options of Ablation-CAM.

    ``channels``: only that many channels of an image, those of largest variance over its cells (None: all, as in
    the paper); ``layer``: a module's name instead of the family's default.
    """

    layer: str | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise UsageError(f"ablation_cam.channels: expected at least 1 or none, got {self.channels}")


@methods.register(
    "ablation_cam",
    options=AblationCamOptions,
    paper="Desai & Ramaswamy 2020, Ablation-CAM",
    equation="3-4",
    needs=(readable_layer,),
    upsampling="bilinear",
    cost="1 forward + the layers behind the map once a channel that is not zero, for all classes together",
    gradient_free=True,
)
def ablation_cam(
    model: Classifier, images: Tensor, classes: Tensor, options: AblationCamOptions, batch_size: int
) -> Tensor:
    """Ablation-CAM: ReLU of the channels weighted by the drop of the class's logit when each is set to zero."""
    behind = network_behind(model, images, chosen_layer(model, options))
    maps = wide(as_map(model, behind.activation, behind.layer))
    chosen = torch.zeros_like(maps[:, :, 0, 0], dtype=torch.bool)
    chosen.scatter_(1, most_varied_channels(maps, options.channels), True)
    # A channel of zeros loses nothing when it is set to zero.
    present = chosen & maps.flatten(2).any(dim=2)
    # The intact map goes first, in the same passes, so that rounding is the same on both sides of a difference.
    owners, columns = torch.nonzero(torch.cat([torch.ones_like(present[:, :1]), present], dim=1), as_tuple=True)

    def ablated(rows: slice) -> Tensor:
        owner, column = owners[rows], columns[rows]
        outputs = _without(model, behind.layer, behind.activation[owner], column - 1)
        return wide(behind.run(outputs, owner)).gather(1, classes[owner])

    scores = torch.cat(run_batches(ablated, len(owners), batch_size))
    table = scores.new_zeros(len(images), 1 + maps.shape[1], classes.shape[1])
    table[owners, columns] = scores
    drops = torch.where(present.unsqueeze(2), table[:, :1] - table[:, 1:], 0)
    return torch.einsum("bchw,bck->bkhw", maps, drops.to(maps.dtype)).relu()


def _without(model: Classifier, layer: str, outputs: Tensor, channels: Tensor) -> Tensor:
    """A layer's outputs ``[P, ...]``, overwritten with zeros in a channel of each map; -1 leaves a map alone."""
    rows = torch.arange(len(channels), device=channels.device)
    changed = channels >= 0
    as_map(model, outputs, layer)[rows[changed], channels[changed]] = 0
    return outputs
