"""The one method interface: pixel maps from ``attribute``, part scores from ``score_parts``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.batching import join_rows, run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts.labels import NO_PART
from xai_core.registry import MethodEntry, build_options, methods


@dataclass(frozen=True)
class PartScores:
    """Scores of parts ``[B, K]``; NaN where an image has fewer than K parts.

    ``terms`` holds the method's own terms in the same shape (for KL-Hessian ``kl_sym``, ``curvature``).
    """

    score: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def attribute(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    method: str,
    options: Any = None,
    parts: Tensor | None = None,
    batch_size: int = 32,
    native: bool = False,
) -> Tensor:
    """Pixel maps of any registered method for the target classes.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; targets: class indices ``[B]``.
        options: the method's options object, or a dict of them; defaults where None.
        parts: labels ``[B, H, W]`` (255 = no part), which part methods need.
        batch_size: the most images in one pass, fewer where these do not fit in memory; it never changes a result.
        native: leave maps in the method's own resolution instead of upsampling to the input's.

    Returns:
        ``[B, H, W]`` float32 (``[B, h, w]`` when ``native``), higher is more relevant.

    Raises:
        UsageError: an unknown method, a family it does not fit, missing parts, or targets out of range.
        OutOfMemory: one image does not fit in memory even alone.
    """
    entry = methods.get(method)
    if entry.output == "parts":
        scores = score_parts(model, images, targets, parts, method=method, options=options, batch_size=batch_size)
        return paint_parts(scores.score, _required_parts(entry, parts))
    check_request(entry, model, images, targets)
    chosen = _options(entry, options)
    batches = run_batches(
        lambda rows: entry.function(model, images[rows], targets[rows], chosen, batch_size),
        len(images),
        batch_size,
    )
    maps = torch.cat(batches).float() if batches else images.new_zeros(0, *images.shape[-2:]).float()
    return maps if native else upsample_map(maps, images.shape[-2:], entry.upsampling)


def score_parts(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor | None,
    *,
    method: str = "kl_hessian",
    options: Any = None,
    batch_size: int = 32,
) -> PartScores:
    """Part scores of a registered part method: see :func:`attribute` for arguments and errors."""
    entry = methods.get(method)
    if entry.output != "parts":
        raise UsageError(f"{method!r} yields pixel maps: expected a part method; average its map inside parts")
    check_request(entry, model, images, targets)
    return entry.function(
        model, images, targets, _required_parts(entry, parts), _options(entry, options), batch_size
    )


def join_scores(scores: Sequence[PartScores]) -> PartScores:
    """The scores of several batches as those of one."""
    return PartScores(
        join_rows([one.score for one in scores]),
        {name: join_rows([one.terms[name] for one in scores]) for name in scores[0].terms},
    )


def paint_parts(scores: Tensor, parts: Tensor, smoothing: int = 5) -> Tensor:
    """Part scores as a pixel map: each pixel takes its part's score, smoothed by a box (KL-Hessian 5.1.1).

    Args:
        scores: ``[B, K]``; parts: labels ``[B, H, W]``, 255 and NaN scores count as 0.
        smoothing: side of the box in pixels; at the border the mean is over the pixels inside.
    """
    table = F.pad(scores.nan_to_num(0.0), (0, NO_PART + 1 - scores.shape[1]))
    painted = table.gather(1, parts.flatten(1).long()).view(parts.shape)
    return F.avg_pool2d(
        painted.unsqueeze(1), smoothing, stride=1, padding=smoothing // 2, count_include_pad=False
    ).squeeze(1)


def upsample_map(maps: Tensor, size: torch.Size | tuple[int, int], rule: str | None) -> Tensor:
    """Maps ``[B, h, w]`` at another resolution by a named interpolation rule (None: they have it already)."""
    if rule is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode=rule, align_corners=False).squeeze(1)


def check_request(entry: MethodEntry, model: Classifier, images: Tensor, targets: Tensor) -> None:
    """Refuses shapes, targets and architectures that a method cannot work on, before any pass.

    Raises:
        UsageError: naming what was expected and got.
    """
    check_family(entry, model)
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        raise UsageError(
            f"{entry.name}: expected images [B, 3, H, W] and targets [B], "
            f"got {tuple(images.shape)} and {tuple(targets.shape)}"
        )
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= model.num_classes):
        raise UsageError(
            f"{entry.name}: expected targets in 0..{model.num_classes - 1}, "
            f"got {int(targets.min())}..{int(targets.max())}"
        )


def check_family(entry: MethodEntry, model: Classifier) -> None:
    """Refuses a method on an architecture it does not fit, naming methods that do."""
    if model.family not in entry.families:
        fitting = [other.name for other in methods if model.family in other.families]
        raise UsageError(
            f"method {entry.name!r} fits {' and '.join(entry.families)} models, but {model.spec.name} is a "
            f"{model.family}; methods that fit it: {', '.join(fitting)}"
        )


def _options(entry: MethodEntry, options: Any) -> Any:
    if isinstance(options, entry.options):
        return options
    return build_options(entry, options or {})


def _required_parts(entry: MethodEntry, parts: Tensor | None) -> Tensor:
    if parts is None:
        raise UsageError(f"method {entry.name!r} scores parts: expected labels [B, H, W], got none")
    return parts
