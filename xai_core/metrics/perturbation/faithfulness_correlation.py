"""Faithfulness correlation: do sums of attributions tell what removing pixels does?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.baselines import Baseline, BaselineKind
from xai_core.errors import UsageError
from xai_core.metrics.correlation import pearson
from xai_core.metrics.evidence import Evidence
from xai_core.metrics.measured import Measured
from xai_core.registry import metrics, refuse_unread


@dataclass(frozen=True)
class FaithfulnessCorrelationOptions:
    """So many ``pixels`` are drawn, ``samples`` times, and replaced by ``baseline``: 0 after normalisation.

    ``seed`` draws the pixels, and the picture of the noise baseline; ``sigma`` belongs to blur.
    """

    pixels: int = 200
    samples: int = 100
    baseline: BaselineKind = "mean"
    sigma: float = 11.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise UsageError(f"pixels: expected at least 1, got {self.pixels}")
        if self.samples < 3:
            raise UsageError(f"samples: expected at least 3, since any two points correlate, got {self.samples}")
        if not self.sigma > 0:
            raise UsageError(f"sigma: expected a number of pixels > 0, got {self.sigma}")
        if self.baseline != "blur":
            refuse_unread(self, f"with baseline {self.baseline!r}", "sigma")

    @property
    def named_baseline(self) -> Baseline:
        """The baseline as the evidence takes it; only noise reads the seed."""
        return Baseline(self.baseline, self.sigma, self.seed if self.baseline == "noise" else Baseline.seed)


@metrics.register(
    "faithfulness_correlation",
    options=FaithfulnessCorrelationOptions,
    paper="Bhatt et al. 2020, faithfulness; iERF VII-G (Fidelity)",
    family="perturbation",
    definition="Pearson correlation over the draws between the sum of the signed map inside the drawn pixels and "
    "the drop of the target's logit when these are replaced by the baseline, all channels together; pixels are "
    "drawn without replacement and alike for all images; a correlation does not change with the map's scale, so "
    "nothing is normalised or clamped",
    higher_is_better=True,
    bounds=(-1.0, 1.0),
    unit="correlation",
    undefined="null where the map is constant or not finite, where it sums up to the same in every draw, or where "
    "the logit falls by the same in every draw",
    cost="samples",
)
def faithfulness_correlation(evidence: Evidence, options: FaithfulnessCorrelationOptions) -> Measured:
    """Faithfulness correlation: what random pixels are attributed against what removing them does."""
    drawn = draw_pixels(evidence.maps[0].numel(), options).to(evidence.images.device)
    attributed = evidence.maps.flatten(1).double()[:, drawn].sum(dim=2)
    drop = logit_drops(evidence, drawn, evidence.baseline(options.named_baseline))
    reasons = {
        **evidence.unranked("pixels"),
        "all draws are attributed the same": _same(attributed),
        "the logit falls by the same in all draws": _same(drop),
    }
    return Measured(pearson(attributed, drop), reasons)


def draw_pixels(size: int, options: FaithfulnessCorrelationOptions) -> Tensor:
    """Indices of the pixels of each draw, out of ``size``, no pixel twice in one: ``[samples, pixels]``.

    Raises:
        UsageError: the image has no more pixels than are to be drawn.
    """
    if options.pixels >= size:
        raise UsageError(f"pixels: expected fewer than the image's {size}, got {options.pixels}")
    generator = torch.Generator().manual_seed(options.seed)
    draws = [torch.randperm(size, generator=generator)[: options.pixels] for _ in range(options.samples)]
    return torch.stack(draws)


def logit_drops(evidence: Evidence, drawn: Tensor, baseline: Tensor) -> Tensor:
    """How far the target's logit falls when each draw's pixels are replaced: ``[B, samples]`` float64.

    Args:
        drawn: pixel indices ``[samples, pixels]``; baseline: ``[B, 3, H, W]``.
    """
    images, device = evidence.images, evidence.images.device
    replaced = torch.zeros(len(drawn), evidence.maps[0].numel(), dtype=torch.bool, device=device)
    replaced = replaced.scatter_(1, drawn, True).view(-1, 1, *images.shape[-2:])
    owner = torch.arange(len(images), device=device).repeat_interleave(len(drawn))
    draw = torch.arange(len(drawn), device=device).repeat(len(images))

    def build(rows: slice) -> Tensor:
        return torch.where(replaced[draw[rows]], baseline[owner[rows]], images[owner[rows]])

    logit = evidence.logit(build, owner).view(len(images), len(drawn))
    return evidence.clean_logits.gather(1, evidence.targets.view(-1, 1)) - logit


def _same(values: Tensor) -> Tensor:
    """Where a row ``[B, n]`` holds one number only; NaN is unlike itself: it is broken, not undefined."""
    return values.amax(dim=1) == values.amin(dim=1)
