"""A network of a few weights that forgets at random and normalises by batch, and pictures that it can learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from xai_core.training import CrossEntropy, Recipe, Training

CLASSES = 3


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16, CLASSES),
        )


def coloured(count: int, seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    """Pictures of noise with one colour stronger, which is the label."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pictures = torch.randint(0, 160, (count, 3, size, size), generator=chance)
    pictures[torch.arange(count), labels] += 90
    return pictures.to(torch.uint8), labels


RECIPE = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "shift": 1, "crop": 0.5}


def training(state: dict[str, Tensor] | None = None, held_out: int = 9, **changes: Any) -> Training:
    """Fifteen steps in three epochs; two pictures of every epoch fill no batch."""
    return Training(
        CrossEntropy(network(), lambda pictures: pictures - 0.5),
        *coloured(22),
        Recipe(**{**RECIPE, **changes}),
        held_out=coloured(held_out, seed=1) if held_out else None,
        state=state,
    )


class Scripted:
    """An objective whose score follows a script: one entry an epoch, and a weight that grows by one a step."""

    def __init__(self, scores: list[float], losses: dict[int, float] | None = None) -> None:
        self.trained: nn.Module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.trained.weight)
        self._scores, self._losses, self._steps = iter(scores), losses or {}, 0
        self.seen: list[Tensor] = []

    def loss(
        self, pictures: Tensor, labels: Tensor, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._steps += 1
        self.seen.append(labels)
        return -self.trained.weight.sum() + self._losses.get(self._steps, 0.0), {
            "progress": torch.tensor(progress)
        }

    def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        score = next(self._scores) if not int(labels[0]) else self._last
        self._last = score
        return {"score": torch.full((len(labels),), score)}
