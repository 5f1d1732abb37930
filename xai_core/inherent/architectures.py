"""IA(p, k) and EA(p, k): classifiers that weigh the embeddings of patches by an importance of their own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from xai_core.arithmetic import wide
from xai_core.errors import UsageError
from xai_core.inherent.networks import ComponentNet, ContextNet, ImportanceNet, check_width, two_layers
from xai_core.inherent.patches import check_size, cut_patches, grid_side

Colours = tuple[float, float, float]


@dataclass(frozen=True)
class ImportanceConfig:
    """All that builds an IA(p, k): ``patch_size`` is p, ``embed_dim`` k, and pictures are squares of ``img_size``.

    ``importance_width`` and ``component_width`` are the channels of the first blocks (64: those of ResNet-18);
    ``mean`` and ``std`` normalise its inputs.
    """

    num_classes: int = 1000
    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 128
    importance_width: int = 64
    component_width: int = 64
    mean: Colours = IMAGENET_DEFAULT_MEAN
    std: Colours = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        grid_side(self.img_size, self.patch_size)
        check_width("num_classes", self.num_classes)
        for name in ("mean", "std"):
            object.__setattr__(self, name, three_colours(name, getattr(self, name)))


@dataclass(frozen=True)
class EmbeddingConfig(ImportanceConfig):
    """All that builds an EA(p, k): as for IA, and ``context_width``, the channels of ContextNet's first block."""

    context_width: int = 64


def three_colours(name: str, values: Any) -> Colours:
    """A mean or standard deviation of red, green and blue.

    Raises:
        UsageError: not three numbers.
    """
    if len(values) != 3:
        raise UsageError(f"{name}: expected three numbers, got {values!r}")
    red, green, blue = map(float, values)
    return red, green, blue


class FrozenImportanceNet(ImportanceNet):
    """An ImportanceNet that another stage inherits: in evaluation mode for ever, so its batch norms stay."""

    def train(self, mode: bool = True) -> FrozenImportanceNet:
        """Evaluation mode, whatever is asked for."""
        super().train(False)
        return self


class WeightedEmbeddings(nn.Module):
    """What IA and EA share: the embeddings E' of patches, weighted by their importance."""

    output_fmt = "NCHW"

    def __init__(self, config: ImportanceConfig, importance_net: ImportanceNet) -> None:
        super().__init__()
        self.config, self.num_classes, self.num_features = config, config.num_classes, config.embed_dim
        self.importance_net = importance_net
        self.component_net = ComponentNet(config.patch_size, config.embed_dim, config.component_width)
        # The sum over N patches begins at the size of one embedding, or the first logits grow with N.
        with torch.no_grad():
            for parameter in self.component_net.fc.parameters():
                parameter /= importance_net.side**2
        self.pretrained_cfg = {
            "input_size": (3, config.img_size, config.img_size),
            "num_classes": config.num_classes,
            "mean": config.mean,
            "std": config.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }

    def importance(self, images: Tensor) -> Tensor:
        """Importance a ``[B, h, w]`` in [0, 1] of the patches of normalised pictures ``[B, 3, H, W]``.

        Raises:
            UsageError: pictures of another size.
        """
        check_size(images, self.config.img_size)
        return self.importance_net(images)

    def weigh(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Importance ``[B, h, w]``, and the embeddings it weighs (E', rows a_i e_i) as a map ``[B, k, h, w]``.

        In evaluation mode no embedding depends on another patch's pixels.
        """
        importance = self.importance(images)
        patches = self.component_net(cut_patches(images, self.config.patch_size))
        embeddings = patches.view(len(images), *importance.shape[1:], -1).permute(0, 3, 1, 2)
        return importance, importance.unsqueeze(1) * embeddings

    def decide(self, weighted: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from weighted embeddings ``[B, k, h, w]``."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of normalised pictures ``[B, 3, H, W]``."""
        return self.decide(self.weigh(images)[1])


class ImportanceArchitecture(WeightedEmbeddings):
    """IA(p, k): the weighted embeddings' sum and two fully connected layers of width k (section 3.1).

    To explainers its features are the weighted embeddings, a map of one cell a patch.
    """

    def __init__(self, config: ImportanceConfig) -> None:
        super().__init__(config, ImportanceNet(config.img_size, config.patch_size, config.importance_width))
        self.head = two_layers(config.embed_dim, config.num_classes)

    def decide(self, weighted: Tensor) -> Tensor:
        """Logits from the sum of the weighted embeddings over all patches."""
        return self.head(wide(weighted).sum(dim=(2, 3)))

    def forward_features(self, images: Tensor) -> Tensor:
        """The weighted embeddings ``[B, k, h, w]``."""
        return self.weigh(images)[1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from what ``forward_features`` gave."""
        return self.decide(features)


class EmbeddingArchitecture(WeightedEmbeddings):
    """EA(p, k): a ContextNet over the weighted embeddings, whose importance is inherited and frozen (section 3.2).

    While it is trained, nothing of its importance is recorded for gradients; a trained one passes gradients of its
    input through the importance, too, on which the logits depend.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__(config, FrozenImportanceNet(config.img_size, config.patch_size, config.importance_width))
        side = self.importance_net.side
        self.context_net = ContextNet(config.embed_dim, side, config.num_classes, config.context_width)

    def importance(self, images: Tensor) -> Tensor:
        """The inherited importance, as in IA; without a graph while this is trained."""
        with torch.no_grad() if self.training else nullcontext():
            return super().importance(images)

    def decide(self, weighted: Tensor) -> Tensor:
        """Logits from the weighted embeddings in their places."""
        return self.context_net(weighted)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map of ContextNet ``[B, 4 * context_width, h', w']``."""
        return self.context_net.blocks(self.weigh(images)[1])

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from what ``forward_features`` gave."""
        return self.context_net.decide(features)


def as_json(config: Any) -> dict[str, Any]:
    """A config as plain values, which ``timm.create_model`` takes back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
