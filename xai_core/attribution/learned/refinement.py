"""Refinement at test time: a few gradient steps on each image's own scores, from those that were predicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.attribution.learned.objective import AreaOptions, signed
from xai_core.attribution.learned.sinkhorn import standardised
from xai_core.attribution.learned.trajectory import areas, make_scene
from xai_core.models import Classifier
from xai_core.precision import full_precision


def refined(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    options: AreaOptions,
    *,
    grid: int,
    steps: int,
    rate: float,
    passes: int,
) -> Tensor:
    """Maps whose relaxed areas are better for the image at hand, by Adam (AHA, test-time refinement).

    What is learnt is an offset on the coarse grid, enlarged bilinearly: the predicted boundaries stay, and no
    single pixel is bent until the model errs. The loss is that of the training at its end, without noise. Each
    image has its own gradients and moments, and keeps the best of all maps on its way, the predicted one among
    them: by the relaxed loss no map gets worse.

    Args:
        images: ``[B, 3, H, W]``; targets: ``[B]``; maps: ``[B, h, w]``; grid: cells a side of the offset.
        rate: Adam's, in deviations of the predicted map; passes: the most pictures in one pass.

    Returns:
        ``[B, h, w]``, standardised.
    """
    start = standardised(maps.flatten(1)).view_as(maps)
    scene = make_scene(model, images, targets, options.terms, passes, None)
    offset = start.new_zeros(len(maps), 1, grid, grid).requires_grad_(True)
    adam = torch.optim.Adam([offset], lr=rate)
    best, least = start, torch.full((len(maps),), torch.inf, dtype=torch.float64, device=maps.device)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            with full_precision(maps.device):
                moved = F.interpolate(offset, size=maps.shape[-2:], mode="bilinear", align_corners=False)
                current = start + moved.squeeze(1)
                taken = options.relaxed_shares(current, 1.0, None)
            loss = signed(areas(scene, taken, options.terms, passes), options.terms)
            together = loss.sum()
        better = loss.detach() < least
        least = torch.where(better, loss.detach(), least)
        best = torch.where(better.view(-1, 1, 1), current.detach(), best)
        if step < steps:
            # Adam treats each number alone, and no image's loss depends on another's offset: the sum is theirs.
            (offset.grad,) = torch.autograd.grad(together, offset)
            adam.step()
    return best
