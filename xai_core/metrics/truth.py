"""What is known of images beside their pixels, for the metrics that compare maps with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

INSIDE, OUTSIDE, UNKNOWN = 1, 0, 255


@dataclass(frozen=True)
class Truth:
    """Ground truth of ``B`` images; None where a data set has none of a kind.

    ``mask`` ``[B, H, W]`` uint8 is 1 on the object of the target class, 0 elsewhere, 255 where nobody knows.
    ``parts`` ``[B, H, W]`` uint8 are the object's true parts (255: none), and ``effects`` ``[B, P]`` how much the
    target's logit falls when the scene is drawn without each of them (NaN: no such part).
    """

    mask: Tensor | None = None
    parts: Tensor | None = None
    effects: Tensor | None = None

    def of(self, rows: slice) -> Truth:
        """The truth of some images."""
        return self._each(lambda values: values[rows])

    def to(self, device: object) -> Truth:
        """The same on a device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Truth:
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return Truth(**{name: None if values is None else change(values) for name, values in given.items()})
