"""Pictures as grids of square patches, and which patches are kept at a threshold of their importance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xai_core.errors import UsageError


def grid_side(img_size: int, patch_size: int) -> int:
    """How many patches of ``patch_size`` pixels lie along the side of a square picture.

    Raises:
        UsageError: a patch that does not divide the side.
    """
    if patch_size < 1 or img_size < 1 or img_size % patch_size:
        divisors = [side for side in range(2, img_size + 1) if img_size % side == 0]
        raise UsageError(
            f"patch_size: expected a divisor of img_size {img_size} ({', '.join(map(str, divisors)) or 'none'}), "
            f"got {patch_size}"
        )
    return img_size // patch_size


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """All patches of all pictures as one batch ``[B * N, C, p, p]``, row by row (section 3.1)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, patch_size, patch_size)


def kept_patches(importance: Tensor, thresholds: float | Tensor, inverted: bool = False) -> Tensor:
    """Which patches stay visible: those of at least the threshold, or, inverted, exactly the others.

    Section 3.3 masks what lies below t; the deletion-like variant (section 4.2, appendix F) is its complement, so
    that a patch whose importance is t, too, is visible in one of both and only there.

    Args:
        importance: any shape; thresholds: a number, or a tensor that broadcasts with it.
    """
    kept = importance >= thresholds
    return ~kept if inverted else kept


def enlarge(grid: Tensor, size: Sequence[int]) -> Tensor:
    """A value a patch ``[B, h, w]`` as a value a cell ``[B, 1, H, W]`` of a map whose sides are multiples."""
    rows, columns = (
        torch.arange(side, device=grid.device) // (side // count)
        for side, count in zip(size, grid.shape[1:], strict=True)
    )
    return grid[:, rows[:, None], columns[None, :]].unsqueeze(1)


def check_threshold(threshold: float) -> None:
    """Refuses a threshold t that is not in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold: expected a number from 0 to 1, got {threshold}")


def check_size(images: Tensor, img_size: int) -> None:
    """Refuses pictures of another size than a network's own, whose patches would be others."""
    if images.shape[-2:] != (img_size, img_size):
        raise UsageError(
            f"pictures: expected {img_size} x {img_size} pixels, which the importance of {img_size} x {img_size} "
            f"was learnt for, got {images.shape[-2]} x {images.shape[-1]}; set model.transform.input_size"
        )
