"""What perturbation methods share: what is behind the mask, the mixing of both, and the scalar that is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from xai_core.baselines import Baseline, make_baseline
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.registry import refuse_unread

MaskBaseline = Literal["mean", "black", "blur"]
Scalar = Literal["probability", "logit"]


@dataclass(frozen=True)
class MaskingOptions:
    """What stands where the image is masked.

    ``baseline``: ``mean`` (the data set's mean colour, zero after normalisation), ``black``, or ``blur`` of the
    image itself by ``sigma`` pixels.
    """

    method: ClassVar[str] = ""
    baselines: ClassVar[tuple[str, ...]] = ("mean", "black", "blur")

    baseline: MaskBaseline = "mean"
    sigma: float = 11.0

    def __post_init__(self) -> None:
        self.expect_one_of("baseline", self.baselines)
        self.expect(self.sigma > 0, "sigma", "a number of pixels > 0")
        if self.baseline != "blur":
            refuse_unread(self, f"with baseline {self.baseline!r}", "sigma")

    def expect(self, right: bool, name: str, expected: str) -> None:
        """Refuses an option's value, naming the option.

        Raises:
            UsageError: ``right`` is false.
        """
        if not right:
            raise UsageError(f"{self.method}.{name}: expected {expected}, got {getattr(self, name)!r}")

    def expect_one_of(self, name: str, choices: Sequence[str]) -> None:
        """Refuses a value that is none of the choices."""
        self.expect(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")

    def expect_at_least(self, least: int, *names: str) -> None:
        """Refuses whole numbers below ``least``."""
        for name in names:
            self.expect(getattr(self, name) >= least, name, f"at least {least}")


@dataclass(frozen=True)
class ScoringOptions(MaskingOptions):
    """As for masking; ``scalar`` says what is read off a masked picture: the class's probability or its logit."""

    scalar: Scalar = "probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_one_of("scalar", ("probability", "logit"))


def behind_the_mask(model: Classifier, images: Tensor, options: MaskingOptions) -> Tensor:
    """What shows where an image is masked, ``[B, 3, H, W]``, in the arithmetic of the images."""
    # The masked picture is data, not a pass: autocast would round it where the clean one is not rounded.
    with torch.autocast(images.device.type, enabled=False):
        return make_baseline(Baseline(options.baseline, options.sigma), model, images)


def blend(images: Tensor, behind: Tensor, keep: Tensor) -> Tensor:
    """The image where ``keep`` (``[n, 1, H, W]``) is true or 1, what is behind it where false or 0."""
    return torch.where(keep, images, behind) if keep.dtype == torch.bool else torch.lerp(behind, images, keep)


def read_scores(model: Classifier, pictures: Tensor, classes: Tensor, scalar: Scalar) -> Tensor:
    """Probabilities or logits of each picture's classes from one forward pass.

    Args:
        pictures: ``[n, 3, H, W]``; classes: ``[n, K]`` class indices.

    Returns:
        ``[n, K]`` float64: what follows are small differences of these.
    """
    logits = model(pictures).double()
    return (logits.softmax(dim=1) if scalar == "probability" else logits).gather(1, classes)


def clean_scores(model: Classifier, images: Tensor, classes: Tensor, scalar: Scalar, batch_size: int) -> Tensor:
    """Scores of the images as they are, ``[B, K]``."""
    return torch.cat(
        run_batches(lambda rows: read_scores(model, images[rows], classes[rows], scalar), len(images), batch_size)
    )


def masked_pictures(
    rows: slice, images: Tensor, behind: Tensor, keep: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Pictures of the flat (mask, image) pairs ``rows`` and whose they are: ``[n, 3, H, W]``, ``[n]``.

    All images of one mask stand side by side, so that a mask is made once, whatever the number of images.

    Args:
        keep: for numbers of masks ``[m]``, where these keep the image, ``[m, 1, H, W]`` as in :func:`blend`.
    """
    flat = torch.arange(rows.start, rows.stop, device=images.device)
    image, mask = flat % len(images), flat // len(images)
    if rows.start % len(images) or rows.stop % len(images):
        return blend(images[image], behind[image], keep(mask)), image
    # Whole rows of images are broadcast: image and baseline copied for every pair would take twice as long.
    return blend(images, behind, keep(mask[:: len(images)]).unsqueeze(1)).flatten(0, 1), image


def cells_fit(model: Classifier, options: Any) -> str | None:
    """A grid whose cells are at least a pixel of the model's input."""
    side = min(model.input_size)
    return (
        None if options.grid <= side else f"its input has {side} pixels a side, too few for {options.grid} cells"
    )
