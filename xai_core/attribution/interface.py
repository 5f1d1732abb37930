"""The one method interface: pixel maps from ``attribute``, part scores from ``score_parts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.batching import join_rows, run_batches
from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.parts.labels import NO_PART
from xai_core.precision import Precision, own_modes
from xai_core.registry import MethodEntry, build_options, methods


@dataclass(frozen=True)
class PartScores:
    """Scores of parts ``[B, K]``; NaN where an image has fewer than K parts.

    ``terms`` holds the method's own terms in the same shape (for KL-Hessian ``kl_sym``, ``curvature``).
    """

    score: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MapsWithArrays:
    """What a method returns instead of its maps where it hands out more.

    ``maps`` are ``[B, K, h, w]``; ``arrays``, by the names of the entry's ``arrays``, ``[B, K, ...]``.
    """

    maps: Tensor
    arrays: dict[str, Tensor]


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
    precision: Precision = "fp32",
    fitted: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Pixel maps of any registered method for the target classes.

    Args:
        images: normalised inputs ``[B, 3, H, W]``; targets: class indices ``[B]``.
        options: the method's options object, or a dict of them; defaults where None.
        parts: labels ``[B, H, W]`` (255 = no part), which part methods need.
        batch_size: the most images in one pass, fewer where these do not fit in memory; it never changes a result.
        native: leave maps in the method's own resolution instead of upsampling to the input's.
        precision: arithmetic of the passes; the caller's own autocast and gradient modes have no effect.
        fitted: what :func:`~xai_core.attribution.fit_method` returned, for a method that learns from data.

    Returns:
        ``[B, H, W]`` float32 (``[B, h, w]`` when ``native``), higher is more relevant.

    Raises:
        UsageError: an unknown method, a model it does not fit, missing parts, or targets out of range.
        NotFinite: an input holds NaN or infinity.
        OutOfMemory: one image does not fit in memory even alone.
    """
    entry = methods.get(method)
    if entry.output == "parts":
        scores = score_parts(
            model,
            images,
            targets,
            parts,
            method=method,
            options=options,
            batch_size=batch_size,
            precision=precision,
            fitted=fitted,
        )
        return paint_parts(scores.score, _required_parts(entry, parts)).float()
    return attribute_classes(
        model,
        images,
        targets.view(-1, 1),
        method=method,
        options=options,
        batch_size=batch_size,
        native=native,
        precision=precision,
        fitted=fitted,
    ).squeeze(1)


def attribute_classes(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    *,
    method: str,
    **how: Any,
) -> Tensor:
    """Pixel maps of several classes of each image, ``[B, K, H, W]``, from shared passes.

    Args:
        classes: class indices ``[B, K]``.
        how: ``options``, ``batch_size``, ``native``, ``precision`` and ``fitted``, as in :func:`attribute`, which
            raises the same errors.
    """
    return _maps_and_arrays(model, images, classes, method, arrays=False, **how).maps


def attribute_arrays(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    *,
    method: str,
    **how: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixel maps of the target classes, and what the method hands out beside them.

    The maps are those of :func:`attribute`, with the same keywords but ``parts``, and the same errors. The entry's
    ``arrays`` names what there is beside them, each ``[B, ...]``; mostly nothing.
    """
    found = _maps_and_arrays(model, images, targets.view(-1, 1), method, arrays=True, **how)
    return found.maps.squeeze(1), {name: values.squeeze(1) for name, values in found.arrays.items()}


def _maps_and_arrays(
    model: Classifier,
    images: Tensor,
    classes: Tensor,
    method: str,
    *,
    options: Any = None,
    batch_size: int = 32,
    native: bool = False,
    precision: Precision = "fp32",
    fitted: Mapping[str, Tensor] | None = None,
    arrays: bool,
) -> MapsWithArrays:
    entry = methods.get(method)
    if entry.output == "parts":
        raise UsageError(f"{method!r} scores parts: expected a method of pixel maps")
    chosen = check_request(entry, model, images, classes, options, precision)
    learned = _learned(entry, chosen, fitted, images)
    with own_modes(precision, images.device):
        images, classes = _usable(images), _usable(classes)

        def explain(rows: slice) -> MapsWithArrays:
            found = entry.function(model, images[rows], classes[rows], chosen, batch_size, **learned)
            if not isinstance(found, MapsWithArrays):
                return MapsWithArrays(found.detach(), {})
            return found if arrays else MapsWithArrays(found.maps, {})

        batches = run_batches(explain, len(images), batch_size)
        if not batches:
            return MapsWithArrays(images.new_zeros(0, classes.shape[1], *images.shape[-2:]).float(), {})
        maps = torch.cat([one.maps for one in batches]).float()
        if not native:
            full = upsample_map(maps.flatten(0, 1), images.shape[-2:], entry.upsampling)
            maps = full.unflatten(0, maps.shape[:2])
        return MapsWithArrays(
            maps, {name: torch.cat([one.arrays[name] for one in batches]) for name in batches[0].arrays}
        )


def score_parts(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor | None,
    *,
    method: str = "kl_hessian",
    options: Any = None,
    batch_size: int = 32,
    precision: Precision = "fp32",
    fitted: Mapping[str, Tensor] | None = None,
) -> PartScores:
    """Part scores of a registered part method: see :func:`attribute` for arguments and errors."""
    entry = methods.get(method)
    if entry.output != "parts":
        raise UsageError(f"{method!r} yields pixel maps: expected a part method; average its map inside parts")
    chosen = check_request(entry, model, images, targets.view(-1, 1), options, precision)
    labels = _required_parts(entry, parts)
    learned = _learned(entry, chosen, fitted, images)
    with own_modes(precision, images.device):
        images, targets, labels = _usable(images), _usable(targets), _usable(labels)
        return entry.function(model, images, targets, labels, chosen, batch_size, **learned)


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
    corners = None if rule.startswith("nearest") else False
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode=rule, align_corners=corners).squeeze(1)


def check_request(
    entry: MethodEntry, model: Classifier, images: Tensor, classes: Tensor, options: Any, precision: Precision
) -> Any:
    """Refuses shapes, targets, models and inputs that a method cannot work on, before any pass.

    Returns:
        The method's options object.

    Raises:
        UsageError: naming what was expected and got; NotFinite: naming the images.
    """
    chosen = _options(entry, options)
    check_method(entry, model, chosen, precision)
    if images.ndim != 4 or classes.ndim != 2 or len(classes) != len(images):
        raise UsageError(
            f"{entry.name}: expected images [B, 3, H, W] and class indices for each [B, K], "
            f"got {tuple(images.shape)} and {tuple(classes.shape)}"
        )
    if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= model.num_classes):
        raise UsageError(
            f"{entry.name}: expected targets in 0..{model.num_classes - 1}, "
            f"got {int(classes.min())}..{int(classes.max())}"
        )
    bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(
            f"{entry.name}: expected finite inputs, got NaN or infinity in image {bad[0]} of the batch"
        )
    return chosen


def check_method(entry: MethodEntry, model: Classifier, options: Any, precision: Precision = "fp32") -> None:
    """Refuses a method on a model it does not fit, saying why and naming methods that fit.

    Raises:
        UsageError: the family, a need of the method, or the precision.
    """
    reason = misfit(entry, model, options)
    if reason is not None:
        fitting = [other.name for other in methods if misfit(other, model, other.options()) is None]
        # Where the method itself fits, its options are to blame, and other methods are no help.
        instead = "" if entry.name in fitting else f"; methods that fit it: {', '.join(fitting)}"
        raise UsageError(f"method {entry.name!r} does not fit {model.spec.name}: {reason}{instead}")
    if precision == "bf16":
        _refuse_half_precision(entry, options)


def _refuse_half_precision(entry: MethodEntry, options: Any) -> None:
    if not entry.half_precision:
        raise UsageError(
            f"method {entry.name!r} needs more than bf16's eight bits of precision: use fp32, or tf32 on a GPU"
        )
    if entry.wraps is not None:
        _refuse_half_precision(*entry.wraps(options))


def misfit(entry: MethodEntry, model: Classifier, options: Any) -> str | None:
    """Why a method with these options cannot explain this model, or None where it can."""
    if model.family not in entry.families:
        return f"it fits {' and '.join(entry.families)} models, and this is a {model.family}"
    reasons = (need(model, options) for need in entry.needs)
    own = next((reason for reason in reasons if reason is not None), None)
    if own is not None or entry.wraps is None:
        return own
    inner, inner_options = entry.wraps(options)
    reason = misfit(inner, model, inner_options)
    return None if reason is None else f"{inner.name!r}, which it is computed from, does not fit: {reason}"


def fitting_entry(entry: MethodEntry, options: Any) -> tuple[MethodEntry, Any] | None:
    """The method that learns from data, with its options: this one, or the one that it is computed from."""
    if entry.fit is not None:
        return entry, options
    return None if entry.wraps is None else fitting_entry(*entry.wraps(options))


def _learned(
    entry: MethodEntry, options: Any, fitted: Mapping[str, Tensor] | None, images: Tensor
) -> dict[str, dict[str, Tensor]]:
    """What a method's function is given beside the rest: its fitted tensors where the images are."""
    if fitting_entry(entry, options) is None:
        if fitted is not None:
            raise UsageError(f"method {entry.name!r} learns nothing from data: expected no fitted, got one")
        return {}
    if fitted is None:
        raise UsageError(
            f"method {entry.name!r} learns from data before it explains: expected fitted, got none; pass what "
            f"fit_method(model, images, targets, method={entry.name!r}, parts=...) returns"
        )
    return {"fitted": {name: _beside(torch.as_tensor(values), images) for name, values in fitted.items()}}


def _beside(tensor: Tensor, images: Tensor) -> Tensor:
    return tensor.to(images) if tensor.is_floating_point() else tensor.to(images.device)


def _usable(tensor: Tensor) -> Tensor:
    """A caller's tensor without its graph; a copy of one made in inference mode, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _options(entry: MethodEntry, options: Any) -> Any:
    if isinstance(options, entry.options):
        return options
    return build_options(entry, options or {})


def _required_parts(entry: MethodEntry, parts: Tensor | None) -> Tensor:
    if parts is None:
        raise UsageError(f"method {entry.name!r} scores parts: expected labels [B, H, W], got none")
    return parts
