"""The three networks of Importance Architectures: ImportanceNet, ComponentNet and ContextNet.

The paper gives the numbers of residual blocks and what comes behind them, and leaves open widths, strides and
stems. Eight residual blocks before an average pooling and a fully connected layer are a ResNet-18: ImportanceNet
is one, and the small networks widen as its first stages do. Blocks are timm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

from xai_core.arithmetic import wide
from xai_core.errors import UsageError
from xai_core.inherent.patches import grid_side

#: From this side on ImportanceNet begins as ResNet-18 does, by a quarter of the side; smaller pictures would
#: shrink to a point, and keep their side, as is usual for CIFAR.
WHOLE_STEM = 112
# A map of 2 x 2 is not halved: 3 x 3 kernels over a single cell would read nothing but padding.
_SMALLEST = 2


def residual_blocks(inside: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """Basic residual blocks (two 3 x 3 convolutions, batch norms and ReLUs), one for each width and stride."""
    before = (inside, *widths)
    return nn.Sequential(*map(_block, before, widths, strides))


def _block(inside: int, width: int, stride: int) -> BasicBlock:
    same = inside == width and stride == 1
    return BasicBlock(
        inside, width, stride, downsample=None if same else downsample_conv(inside, width, 1, stride=stride)
    )


def halvings(side: int, blocks: int) -> list[int]:
    """Strides of blocks that halve a map of this side for as long as more than 2 x 2 is left."""
    strides = []
    for _ in range(blocks):
        strides.append(2 if side > _SMALLEST else 1)
        side = (side + 1) // 2 if side > _SMALLEST else side
    return strides


def initialise(module: nn.Module) -> None:
    """He initialisation of the convolutions, and residual branches that begin as nothing (as timm's ResNet).

    Weights lie channels last: over many small patches the convolutions then take half the time.
    """
    for one in module.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.kaiming_normal_(one.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(one, BasicBlock):
            one.zero_init_last()
    module.to(memory_format=torch.channels_last)


def check_width(name: str, width: int) -> int:
    """The width, if it is one.

    Raises:
        UsageError: a number below 1.
    """
    if width < 1:
        raise UsageError(f"{name}: expected a number of channels of at least 1, got {width}")
    return width


class ImportanceNet(nn.Module):
    """Importance a of every patch, from the whole picture (section 3.1).

    Eight residual blocks, average pooling, a fully connected layer with an output a patch, and a sigmoid:
    ``[B, 3, H, W]`` to ``[B, h, w]`` in [0, 1]. Widths: ``width`` times 1, 1, 2, 2, 4, 4, 8, 8 (64: ResNet-18).
    """

    def __init__(self, img_size: int, patch_size: int, width: int = 64) -> None:
        super().__init__()
        self.side = grid_side(img_size, patch_size)
        widths = [check_width("importance_width", width) * 2 ** (block // 2) for block in range(8)]
        self.stem = _stem(width, whole=img_size >= WHOLE_STEM)
        self.blocks = residual_blocks(width, widths, (1, 1, 2, 1, 2, 1, 2, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], self.side**2)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Importance ``[B, h, w]`` of the patches of pictures ``[B, 3, H, W]``."""
        scores = self.fc(self.pool(self.blocks(self.stem(images))).flatten(1))
        return wide(scores).sigmoid().unflatten(1, (self.side, self.side))


class ComponentNet(nn.Module):
    """Embedding e of every patch, each from its own pixels alone (section 3.1).

    Three residual blocks of widths ``width`` times 1, 2, 4 behind a convolution, average pooling and a fully
    connected layer: ``[n, 3, p, p]`` to ``[n, k]``.
    """

    def __init__(self, patch_size: int, embed_dim: int, width: int = 64) -> None:
        super().__init__()
        widths = [check_width("component_width", width) * scale for scale in (1, 2, 4)]
        self.stem = _stem(width, whole=False)
        self.blocks = residual_blocks(width, widths, halvings(patch_size, len(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], check_width("embed_dim", embed_dim))
        initialise(self)

    def forward(self, patches: Tensor) -> Tensor:
        """Embeddings ``[n, k]`` of patches ``[n, 3, p, p]``."""
        return self.fc(self.pool(self.blocks(self.stem(patches))).flatten(1))


class ContextNet(nn.Module):
    """Logits from the weighted embeddings as a map, with their places (section 3.2).

    Three residual blocks of widths ``width`` times 1, 2, 4, max pooling and two fully connected layers. ``blocks``
    and ``decide`` are two steps, so that the map between them can be looked at.
    """

    def __init__(self, embed_dim: int, side: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        widths = [check_width("context_width", width) * scale for scale in (1, 2, 4)]
        self.blocks = residual_blocks(embed_dim, widths, halvings(side, len(widths)))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = two_layers(widths[-1], num_classes)
        initialise(self)

    def decide(self, features: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from the blocks' output ``[B, 4 * width, h', w']``."""
        return self.head(self.pool(features).flatten(1))

    def forward(self, weighted: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from the weighted embeddings ``[B, k, h, w]``."""
        return self.decide(self.blocks(weighted))


def two_layers(width: int, num_classes: int) -> nn.Sequential:
    """Two fully connected layers; the first is as wide as its input (the bottleneck of section 3.1)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))


def _stem(width: int, whole: bool) -> nn.Sequential:
    kernel, stride = (7, 2) if whole else (3, 1)
    begin = nn.Conv2d(3, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    shrink = [nn.MaxPool2d(3, stride=2, padding=1)] if whole else []
    return nn.Sequential(begin, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *shrink)
