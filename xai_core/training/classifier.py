"""A plain recipe for an image classifier: AdamW, warm-up and cosine, mirrored and shifted pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from xai_core.errors import UsageError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast is learnt; ``shift``: pixels that a picture moves at most; ``seed`` draws it all.

    ``precision``: that of the passes; ``bf16`` multiplies in bfloat16, which pays where the hardware can.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warm_up: float = 0.1
    shift: int = 4
    mirror: bool = True
    seed: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise UsageError(
                "training: expected epochs and batch_size of at least 1, learning_rate > 0 and weight_decay >= 0, "
                f"got {self.epochs}, {self.batch_size}, {self.learning_rate} and {self.weight_decay}"
            )
        if self.precision not in get_args(Precision):
            raise UsageError(f"training.precision: expected fp32 or bf16, got {self.precision!r}")
        if not (0 <= self.label_smoothing < 1 and 0 <= self.warm_up < 1 and self.shift >= 0 and self.seed >= 0):
            raise UsageError(
                "training: expected label_smoothing and warm_up from 0 to below 1, shift and seed of at least 0, "
                f"got {self.label_smoothing}, {self.warm_up}, {self.shift} and {self.seed}"
            )


#: Called after each epoch with its number from 1 and the mean loss of its batches.
OnEpoch = Callable[[int, float], None]


def train_classifier(
    module: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    recipe: Recipe,
    on_epoch: OnEpoch = lambda epoch, loss: None,
) -> nn.Module:
    """Trains a module in place by cross-entropy, and gives it back in evaluation mode.

    Args:
        pictures: uint8 ``[N, 3, H, W]``, held in memory; labels: ``[N]``; both where the module is.
        normalise: pictures in [0, 1] to the module's input space.

    Raises:
        UsageError: the loss is no number; the message names the step.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    module.train().requires_grad_(True)
    steps = max(1, len(pictures) // recipe.batch_size)
    optimiser = torch.optim.AdamW(module.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.epochs * steps, pct_start=max(recipe.warm_up, 1e-6)
    )
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(pictures), generator=generator).to(pictures.device)
        total = torch.zeros((), device=pictures.device)
        for step in range(steps):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = normalise(_vary(pictures[chosen], recipe, generator).float() / 255)
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = module(batch)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        if not total.isfinite():
            raise UsageError(
                f"training: expected a finite loss, got {total.item()} in epoch {epoch + 1} of {recipe.epochs}; "
                f"lower learning_rate (now {recipe.learning_rate})"
            )
        on_epoch(epoch + 1, total.item() / steps)
    return module.eval().requires_grad_(False)


def _vary(pictures: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Each picture moved by its own shift, black coming in at the border, and half of them mirrored."""
    count, _, height, width = pictures.shape
    reach = 2 * recipe.shift + 1
    top, left = (torch.randint(reach, (count, 1), generator=generator).to(pictures.device) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator).to(pictures.device) < (0.5 if recipe.mirror else 0.0)
    rows = torch.arange(height, device=pictures.device) + top
    columns = torch.arange(width, device=pictures.device)
    columns = torch.where(mirrored, width - 1 - columns, columns) + left
    padded = F.pad(pictures, [recipe.shift] * 4)
    every = torch.arange(count, device=pictures.device)
    return padded.permute(0, 2, 3, 1)[every[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def accuracy(
    module: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    batch_size: int = 256,
) -> float:
    """The share of uint8 pictures ``[N, 3, H, W]`` whose highest logit is their label."""
    right = [
        (module(normalise(batch.float() / 255)).argmax(dim=1) == known).sum()
        for batch, known in zip(pictures.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.stack(right).sum().item() / len(labels)
