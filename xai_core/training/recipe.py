"""How long, how fast and on what variations of the pictures is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from xai_core.errors import UsageError

Precision = Literal["fp32", "bf16"]
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Recipe:
    """What a training by AdamW takes beside its objective and its pictures; ``seed`` draws all that is random.

    ``warm_up``: the share of the steps in which the rate rises; after them it falls by ``schedule``.
    ``precision``: that of the passes; ``bf16`` multiplies in bfloat16, which pays where the hardware can.
    ``shift``: pixels that a picture moves at most; ``mirror``: whether half of them are mirrored; ``crop``: the
    smallest share of a picture's area that is cut out and drawn large, 1 for none.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.1
    schedule: Schedule = "cosine"
    precision: Precision = "fp32"
    shift: int = 4
    mirror: bool = True
    crop: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0 or self.weight_decay < 0:
            raise UsageError(
                "training: expected epochs and batch_size of at least 1, learning_rate > 0 and weight_decay >= 0, "
                f"got {self.epochs}, {self.batch_size}, {self.learning_rate} and {self.weight_decay}"
            )
        for name, allowed in (("precision", get_args(Precision)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"training.{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if not (0 <= self.warm_up < 1 and 0 < self.crop <= 1 and self.shift >= 0 and self.seed >= 0):
            raise UsageError(
                "training: expected warm_up from 0 to below 1, crop above 0 and up to 1, shift and seed of at "
                f"least 0, got {self.warm_up}, {self.crop}, {self.shift} and {self.seed}"
            )
