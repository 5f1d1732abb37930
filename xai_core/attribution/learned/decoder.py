"""The light decoder over a frozen classifier's features: one pass gives every place's relevance to a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from xai_core.errors import UsageError
from xai_core.layers import as_map, captured
from xai_core.models import Classifier
from xai_core.precision import full_precision

#: Cells a side of the coarse scores: 784 cells are the most that a full permutation is made of.
LARGEST_GRID = 28


@dataclass(frozen=True)
class DecoderConfig:
    """All that builds a decoder beside its model.

    ``layers``: whose outputs are read, by default :func:`default_layers`. ``grid``: cells a side of the coarse
    scores, by default the token grid's longer side, or one for 16 pixels. ``width`` of its features; ``blocks`` on
    the grid; ``guide`` channels of the boundary refinement; ``stride``: pixels a side of one place of the map.
    """

    layers: tuple[str, ...] = ()
    grid: int | None = None
    width: int = 64
    blocks: int = 2
    guide: int = 16
    stride: int = 4

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "guide", "stride"):
            if getattr(self, name) < 1:
                raise UsageError(f"aha.{name}: expected at least 1, got {getattr(self, name)}")
        if self.grid is not None and not 2 <= self.grid <= LARGEST_GRID:
            raise UsageError(f"aha.grid: expected 2 to {LARGEST_GRID} cells a side, got {self.grid}")


def completed(config: DecoderConfig, model: Classifier) -> DecoderConfig:
    """The config with what depends on the model filled in.

    Raises:
        UsageError: the model does not say which layers it has, or has none of that name; its pictures have fewer
            than two of the map's places a side.
    """
    if min(map_size(config, model)) < 2:
        rows, columns = model.input_size
        raise UsageError(
            f"aha.stride: expected at most {min(rows, columns) // 2}, so that the map of a picture of {rows} x "
            f"{columns} pixels has 2 places a side at least, got {config.stride}; set a smaller one"
        )
    layers = tuple(config.layers) or default_layers(model)
    for name in layers:
        model.layer(name)
    side = max(model.token_grid) if model.family == "vit" else max(model.input_size) // 16
    return replace(config, layers=layers, grid=config.grid or min(max(side, 2), LARGEST_GRID))


def map_size(config: DecoderConfig, model: Classifier) -> tuple[int, int]:
    """Rows and columns of the map; pixels at the border that fill no place of it are not read."""
    rows, columns = model.input_size
    return rows // config.stride, columns // config.stride


def default_layers(model: Classifier) -> tuple[str, ...]:
    """Three blocks of a transformer, the last one among them; of maps the last four at most, from 1/4 of the side.

    Raises:
        UsageError: timm does not know the model's stages.
    """
    stages = [entry for entry in getattr(model.module, "feature_info", None) or [] if entry.get("module")]
    if model.family == "vit":
        count = len(stages)
        chosen = [stages[-(-count * third // 3) - 1] for third in (1, 2, 3)] if count else []
    else:
        chosen = [entry for entry in stages if entry["reduction"] >= 4][-4:]
    if not chosen:
        raise UsageError(f"aha.layers: {model.spec.name} does not say which stages it has; name layers to read")
    return tuple(dict.fromkeys(str(entry["module"]) for entry in chosen))


class Block(nn.Module):
    """A residual block on the grid: what is around each cell, then what its channels make of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.within = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, cells: Tensor) -> Tensor:
        """Cells ``[B, g, g, width]`` of the same shape."""
        return cells + self.within(self.around(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class OneMap(nn.Conv2d):
    """A 3 x 3 convolution to one map: its nine taps as one product of all positions, then sums of the shifted.

    On a CPU that takes a quarter of the time of the convolutions that torch calls for one channel out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``[B, C, h, w]`` to ``[B, 1, h, w]``."""
        taps = self.weight[0].flatten(1).T @ maps.transpose(0, 1).flatten(1)
        rows = _shifted_sum(taps.view(3, 3, len(maps), *maps.shape[-2:]), dim=2)
        return _shifted_sum(rows, dim=2).unsqueeze(1)


def _shifted_sum(taps: Tensor, dim: int) -> Tensor:
    """The sum of the taps before, at and behind a position, ``taps[0]`` to ``taps[2]``; ``dim`` of one of them."""
    before, total, behind = taps[0], taps[1].clone(), taps[2]
    inner = total.shape[dim] - 1
    total.narrow(dim, 1, inner).add_(before.narrow(dim, 0, inner))
    total.narrow(dim, 0, inner).add_(behind.narrow(dim, 1, inner))
    return total


class Decoder(nn.Module):
    """Features of some layers, the picture and the class, to a map of relevance.

    The class enters as the classifier's own weight vector of it, which scales and shifts the features on the grid.
    Coarse scores are enlarged bilinearly; light convolutions on the picture beside them add what the cells are too
    coarse for, at first nothing. Nothing is normalised over a batch.

    Args:
        channels: of each layer that is read; class_width: of a class's vector.
    """

    def __init__(self, channels: Sequence[int], class_width: int, config: DecoderConfig) -> None:
        super().__init__()
        width, guide = config.width, config.guide
        self.grid = config.grid or LARGEST_GRID
        self.of_layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(one), nn.Linear(one, width)) for one in channels)
        self.of_class = nn.Sequential(nn.LayerNorm(class_width), nn.Linear(class_width, 2 * width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(config.blocks)))
        # The coarse score first, behind it what the refinement is told of the cell.
        self.of_cells = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1 + guide))
        self.of_picture = nn.Conv2d(3, guide, config.stride, stride=config.stride)
        self.refine = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(guide, guide, 3, padding=1),
            nn.ReLU(inplace=True),
            OneMap(guide),
        )
        nn.init.zeros_(self.refine[-1].weight)

    def forward(self, features: Sequence[Tensor], images: Tensor, vectors: Tensor) -> Tensor:
        """Maps ``[B, K, H / stride, W / stride]`` of K classes of each image.

        Args:
            features: ``[B, C, h, w]`` of each layer; images: ``[B, 3, H, W]``; vectors: ``[B, K, D]`` of classes.
        """
        read = [layer(_cells(maps, self.grid)) for layer, maps in zip(self.of_layers, features, strict=True)]
        scale, shift = self.of_class(vectors)[:, :, None, None].chunk(2, dim=4)
        cells = torch.addcmul(shift, reduce(torch.add, read).unsqueeze(1), 1 + scale)
        # Channels stay last, as they are on the grid: nothing is copied between here and the map.
        told = self.of_cells(self.blocks(cells.flatten(0, 1))).permute(0, 3, 1, 2)
        guide = self.of_picture(images)
        beside = _enlarged(told[:, 1:], guide.shape[-2:]).unflatten(0, vectors.shape[:2])
        detail = self.refine(beside.add_(guide.unsqueeze(1)).flatten(0, 1))
        maps = _enlarged(told[:, :1], guide.shape[-2:]) + detail
        return maps.squeeze(1).unflatten(0, vectors.shape[:2])


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _cells(maps: Tensor, side: int) -> Tensor:
    """Maps on the grid, channels last: means of what is finer, bilinear where it is coarser."""
    rows, columns = maps.shape[-2:]
    if min(rows, columns) > side:
        maps = F.adaptive_avg_pool2d(maps, side)
    elif (rows, columns) != (side, side):
        maps = _enlarged(maps, (side, side))
    return maps.permute(0, 2, 3, 1)


def class_vectors(model: Classifier) -> Tensor:
    """What a class is to the model, ``[C, D]``: its row of the classifier's weights (their mean, of two heads).

    Raises:
        UsageError: the model ends in no linear layer with a row for every class.
    """
    heads = model.module.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    rows = [head.weight.detach().flatten(1) for head in heads if isinstance(getattr(head, "weight", None), Tensor)]
    if len(rows) != len(heads) or any(len(one) != model.num_classes for one in rows):
        raise UsageError(
            f"aha: expected a classifier with a row of weights for each of the {model.num_classes} classes, got "
            f"{', '.join(type(head).__name__ for head in heads)} in {model.spec.name}"
        )
    return torch.stack(rows).mean(dim=0)


class LearnedExplainer:
    """A decoder bound to the frozen classifier that it explains.

    Args:
        decoder: a trained one; by default a new one, drawn from torch's global generator.
    """

    def __init__(self, model: Classifier, config: DecoderConfig, decoder: Decoder | None = None) -> None:
        self.model, self.config = model, completed(config, model)
        self.vectors = class_vectors(model)
        self.decoder = self._new_decoder() if decoder is None else decoder

    def _new_decoder(self) -> Decoder:
        blank = torch.zeros(1, 3, *self.model.input_size, device=self.model.device, dtype=self.model.dtype)
        channels = [one.shape[1] for one in self.read(blank)[0]]
        return Decoder(channels, self.vectors.shape[1], self.config).to(self.model.device, self.model.dtype)

    def read(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs ``[B, C, h, w]`` and the logits ``[B, C]`` of one pass, without a graph."""
        with torch.no_grad(), captured(self.model, self.config.layers) as outputs:
            logits = self.model(images)
        return [as_map(self.model, outputs[name], name) for name in self.config.layers], logits

    def maps(self, features: Sequence[Tensor], images: Tensor, classes: Tensor) -> Tensor:
        """Maps ``[B, K, h, w]`` of the classes ``[B, K]``, with the decoder's graph where gradients are on.

        In full precision: a map is an order, and rounded to bfloat16 two of five places would share theirs.
        """
        dtype = self.vectors.dtype
        with full_precision(images.device):
            return self.decoder([one.to(dtype) for one in features], images.to(dtype), self.vectors[classes])
