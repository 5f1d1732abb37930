"""What a training loop needs to know of that which it trains."""

from __future__ import annotations

from typing import Protocol

from torch import Generator, Tensor, nn


class Objective(Protocol):
    """Something with parameters, a loss that falls as they get better, and a measure on held-out pictures.

    Pictures are float ``[B, 3, H, W]`` in [0, 1], not normalised, after augmentation; labels are int64 ``[B]``.
    """

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are learnt, and whose parameters and buffers a checkpoint holds.

        Frozen parts, such as the model that is explained, are not in it.
        """

    def loss(
        self, pictures: Tensor, labels: Tensor, progress: float, generator: Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and scalars to log beside it.

        Args:
            progress: the share of all steps that is done, from 0 to below 1, for schedules.
            generator: on the CPU; all randomness comes from it, so that a resumed training draws the same.
        """

    def measure(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is known of held-out pictures, each ``[B]``: their means are logged.

        ``score`` is among them, higher is better: the epoch with the highest mean gives the final weights.
        """
