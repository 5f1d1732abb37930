"""AIC and SIC: performance against the information that a picture regains."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.interpolate import griddata
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.metrics.perturbation.curves import NULL_PIXELS, area
from xai_core.metrics.trajectory import Curve
from xai_core.registry import metrics, refuse_unread, variant_id

#: What tells how much information a picture holds: the bytes that this encoder needs.
CODEC: dict[str, Any] = {"format": "webp", "lossless": True, "quality": 100}
#: Levels of information at which curves are kept, the same for all images.
KEPT_LEVELS = 101


@dataclass(frozen=True)
class InformationOptions:
    """``thresholds``: shares of the pixels that are revealed, most relevant first.

    ``seed_fraction`` of the pixels, drawn by ``seed`` and the same for all images, are revealed from the start.
    """

    thresholds: tuple[float, ...] = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.13, 0.21, 0.34, 0.5, 0.75)
    seed_fraction: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        rising = all(one < other for one, other in itertools.pairwise((0, *self.thresholds, 1)))
        if not self.thresholds or not rising:
            raise UsageError(f"thresholds: expected rising numbers between 0 and 1, got {list(self.thresholds)}")
        if not 0 <= self.seed_fraction < 1:
            raise UsageError(f"seed_fraction: expected a share from 0 to below 1, got {self.seed_fraction}")
        if self.seed_fraction == 0:
            refuse_unread(self, "without seed pixels", "seed")


@dataclass(frozen=True)
class Regained:
    """Pictures from blurred to whole, ``[B, T + 2]`` each: their bytes, and the model's answer to them."""

    size: Tensor
    probability: Tensor
    accuracy: Tensor


PICTURES = (
    "Pictures are 8-bit. Known at first are the four corners and the seed pixels, then also the pixels whose "
    "saliency is at or above its (1 - t) quantile for each threshold t (ties in index order), at last all; the "
    "others are interpolated linearly between the known ones (Delaunay triangulation). Information: bytes as "
    "lossless WebP of quality 100. Both axes are scaled to 0 at the first picture and 1 at the last and clamped "
    "to [0, 1]; points are sorted by information, each takes the best score so far; the area is the trapezoid's"
)
NULL = (
    f"{NULL_PIXELS}; null where the whole picture is not predicted as the target, or needs no more bytes or "
    "scores no higher than the first one"
)


@metrics.register(
    "aic",
    options=InformationOptions,
    paper="Kapishnikov et al. 2019, XRAI, performance information curves; VAR 4.2",
    family="perturbation",
    definition="area under the accuracy (1 where the target is the top class, else 0) against the information "
    f"that a blurred picture regains, most relevant pixels first. {PICTURES}",
    higher_is_better=True,
    unit="accuracy",
    undefined=NULL,
    cost="thresholds + 2, and as many encodings on the CPU",
)
def aic(evidence: Evidence, options: InformationOptions) -> Measured:
    """AIC: area under the accuracy information curve."""
    return _measured("aic", evidence, options, lambda regained: regained.accuracy)


@metrics.register(
    "sic",
    options=InformationOptions,
    paper="Kapishnikov et al. 2019, XRAI, performance information curves; VAR 4.2",
    family="perturbation",
    definition="area under the target's softmax against the information that a blurred picture regains, most "
    f"relevant pixels first. {PICTURES}",
    higher_is_better=True,
    unit="share of the softmax regained",
    undefined=NULL,
    cost="thresholds + 2, and as many encodings on the CPU",
)
def sic(evidence: Evidence, options: InformationOptions) -> Measured:
    """SIC: area under the softmax information curve."""
    return _measured("sic", evidence, options, lambda regained: regained.probability)


def _measured(
    name: str, evidence: Evidence, options: InformationOptions, read: Callable[[Regained], Tensor]
) -> Measured:
    """The area under one score's curve, which is recorded."""
    regained = evidence.once(("information", options), lambda: _regain(evidence, options))
    score = read(regained)
    reasons = {
        **evidence.unranked("pixels"),
        "the prediction is not the target": regained.accuracy[:, -1] == 0,
        "the blurred picture holds as much information": regained.size[:, 0] >= regained.size[:, -1],
        "the blurred picture scores as high": score[:, 0] >= score[:, -1],
    }
    curve = monotone_curve(_share_regained(regained.size), _share_regained(score))
    evidence.record(variant_id(name, options), sampled(curve, KEPT_LEVELS), reasons)
    return Measured(area(curve), reasons)


def monotone_curve(information: Tensor, score: Tensor) -> Curve:
    """Points ``[B, n]`` in order of information, each with the best score reached with no more of it."""
    rising = score.argsort(dim=1)
    order = rising.gather(1, information.gather(1, rising).argsort(dim=1, stable=True))
    return Curve(information.gather(1, order), score.gather(1, order).cummax(dim=1).values)


def sampled(curve: Curve, levels: int) -> Curve:
    """A curve ``[B, n]`` over [0, 1], linear between its points, at equally many levels for every image."""
    x, y = curve.fraction.contiguous(), curve.prob
    grid = torch.linspace(0, 1, levels, dtype=x.dtype, device=x.device).expand(len(x), -1).contiguous()
    after = torch.searchsorted(x, grid, right=True).clamp(1, x.shape[1] - 1)
    start, end = x.gather(1, after - 1), x.gather(1, after)
    share = torch.where(end > start, (grid - start) / (end - start), 1.0)
    return Curve(grid, torch.lerp(y.gather(1, after - 1), y.gather(1, after), share))


def _share_regained(values: Tensor) -> Tensor:
    """Values ``[B, n]`` as shares of the way from an image's first to its last, within [0, 1]."""
    first, last = values[:, :1], values[:, -1:]
    return ((values - first) / (last - first)).clamp(0.0, 1.0)


def _regain(evidence: Evidence, options: InformationOptions) -> Regained:
    """Interpolation and encoding have no batched form: they go picture by picture on the CPU."""
    images, device = evidence.images, evidence.images.device
    pixels = evidence.maps[0].numel()
    pictures = _eight_bit(evidence)
    position = evidence.ranking("pixels").position.cpu().numpy()
    seeds = seed_mask(evidence.maps.shape[1], evidence.maps.shape[2], options)
    counts = [0, *(revealed_pixels(pixels, threshold) for threshold in options.thresholds), pixels]
    of = [(image, count) for image in range(len(images)) for count in counts]
    owner = torch.tensor([image for image, _ in of], device=device)
    size = torch.zeros(len(of), dtype=torch.float64)

    def build(rows: slice) -> Tensor:
        shown = [bokeh(pictures[image], seeds | (position[image] < count)) for image, count in of[rows]]
        # A picture is gone after its forward, so it is weighed here.
        size[rows] = torch.tensor([encoded_size(one) for one in shown], dtype=torch.float64)
        return evidence.model.normalise(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).to(images) / 255)

    def answer(logits: Tensor, rows: slice) -> Tensor:
        target = evidence.targets[owner[rows]]
        probability = logits.softmax(dim=1).gather(1, target.view(-1, 1)).squeeze(1)
        # No answer is broken, and not a wrong one.
        right = torch.where(probability.isnan(), torch.nan, (logits.argmax(dim=1) == target).double())
        return torch.stack([probability, right], dim=1)

    probability, accuracy = evidence.forward(build, owner, answer).view(len(images), -1, 2).unbind(dim=2)
    return Regained(size.view(len(images), -1).to(device), probability, accuracy)


def _eight_bit(evidence: Evidence) -> np.ndarray:
    """The images as the codec takes them: uint8 ``[B, H, W, 3]``."""
    pictures = evidence.model.denormalise(evidence.images) * 255
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def revealed_pixels(pixels: int, threshold: float) -> int:
    """How many of so many different numbers lie at or above their (1 - threshold) quantile."""
    return pixels - math.ceil((pixels - 1) * (1 - threshold))


def seed_mask(height: int, width: int, options: InformationOptions) -> np.ndarray:
    """The pixels that are known from the start, bool ``[H, W]``: some at random, and the corners."""
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(height * width, generator=generator)[: int(height * width * options.seed_fraction)]
    mask = np.zeros((height, width), dtype=bool)
    mask.flat[drawn.numpy()] = True
    mask[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    return mask


def bokeh(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A picture uint8 ``[H, W, 3]`` whose pixels are interpolated linearly between the known ones ``[H, W]``."""
    filled = picture.copy()
    if not known.all():
        values = griddata(np.argwhere(known), picture[known], np.argwhere(~known))
        # Halves that rounding has moved are halves again in float32, and so fall to the same side everywhere.
        filled[~known] = values.astype(np.float32).round()
    return filled


def encoded_size(picture: np.ndarray) -> int:
    """Bytes of a picture uint8 ``[H, W, 3]`` in the codec."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **CODEC)
    return buffer.tell()
