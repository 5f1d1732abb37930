"""What a metric gives: a value for every image, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Values ``[B]`` of some images, and where there is none, why.

    ``undefined`` says by reason where it applies, ``[B]`` bool; of several the first is told. A value that is NaN
    or infinite where no reason applies is no null: something is broken, and the image is set aside.
    """

    value: Tensor
    undefined: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def defined(self) -> Tensor:
        """Where no reason speaks against a value, ``[B]``."""
        known = torch.ones_like(self.value, dtype=torch.bool)
        for where in self.undefined.values():
            known &= ~where
        return known

    @property
    def reasons(self) -> tuple[str | None, ...]:
        """Why each image has no value; None where it has one."""
        told: list[str | None] = [None] * len(self.value)
        for reason, where in self.undefined.items():
            for row in where.nonzero().flatten().tolist():
                told[row] = told[row] or reason
        return tuple(told)
