"""Parts: an image cut into the regions that part methods score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xai_core.errors import NotFinite, UsageError
from xai_core.models import Classifier
from xai_core.parts import grid, mask_files, slic, spectral, tokens  # noqa: F401  (importing registers them)
from xai_core.parts.features import position_features
from xai_core.parts.labels import MOST_PARTS, NO_PART, compact, part_areas, part_boxes, part_counts
from xai_core.parts.merge import merge_fragments
from xai_core.parts.parser import ParserInput
from xai_core.registry import ParserEntry, parsers

__all__ = [
    "MOST_PARTS",
    "NO_PART",
    "ParserInput",
    "parse_parts",
    "part_areas",
    "part_boxes",
    "part_counts",
]


def parse_parts(
    model: Classifier,
    images: Tensor,
    *,
    parser: str = "tokens",
    options: object | None = None,
    k: int = 12,
    min_area: float = 0.005,
    masks: Tensor | None = None,
    backbone: Classifier | None = None,
    seed: int = 0,
) -> Tensor:
    """Cuts each image into parts, without fragments (KL-Hessian, section 4.1).

    An image's parts depend on that image alone, not on the batch it comes in.

    Args:
        model: the classifier whose inputs the images are.
        images: ``[B, 3, H, W]``, normalised for ``model``.
        parser: name of a registered parser.
        options: the parser's options object; None for its defaults.
        k: number of parts asked for, 1 .. 254. An image can come out with fewer, never with more. The parser
            ``masks`` takes the number from the masks.
        min_area: connected regions below this fraction of the image are merged into a neighbour.
        masks: integers ``[B, H, W]``, read by parsers that need them.
        backbone: the network whose features are clustered, if not ``model``.
        seed: of everything random.

    Returns:
        uint8 ``[B, H, W]`` on the images' device: the parts of image b are 0 .. K_b - 1 in the order in which
        a reader meets them, row by row; ``NO_PART`` (255) where there is none. Only masks leave pixels
        without a part, all of them where a mask has nothing but ignored values.

    Raises:
        UsageError: an unknown parser, options of another parser, k or min_area out of range, more parts than
            positions, or masks that are missing or do not fit the images.
        NotFinite: the network gives NaN or infinite features for some image.
    """
    entry = parsers.get(parser)
    options = entry.options() if options is None else options
    _check(entry, options, k, min_area)
    reads_features, reads_masks = "features" in entry.needs, "masks" in entry.needs
    given = ParserInput(
        images=images,
        pictures=model.denormalise(images.float()).permute(0, 2, 3, 1).cpu().numpy(),
        features=_finite_features(model, images, backbone) if reads_features else None,
        masks=_checked_masks(entry, masks, images) if reads_masks else None,
        k=k,
        seed=seed,
    )
    labels = [compact(merge_fragments(one, min_area)) for one in entry.function(given, options)]
    return torch.from_numpy(np.stack(labels)).to(images.device)


def _check(entry: ParserEntry, options: object, k: int, min_area: float) -> None:
    if not isinstance(options, entry.options):
        raise UsageError(
            f"parts: the parser {entry.name!r} expected {entry.options.__name__} as its options, "
            f"got {type(options).__name__}; build them with registry.build_options"
        )
    if not 1 <= k <= MOST_PARTS:
        raise UsageError(
            f"parts.k: expected 1 to {MOST_PARTS} (labels are bytes, {NO_PART} is no part), got {k}; "
            "choose a k in that range"
        )
    if not 0 <= min_area < 1:
        raise UsageError(
            f"parts.min_area: expected a fraction of the image, at least 0 and below 1, got {min_area}; "
            "0.005 is half a percent"
        )


def _finite_features(model: Classifier, images: Tensor, backbone: Classifier | None) -> np.ndarray:
    features = position_features(model, images, backbone)
    if not features.isfinite().all():
        raise NotFinite(f"{(backbone or model).spec.name} gave features that are NaN or infinite")
    return features.cpu().numpy()


def _checked_masks(entry: ParserEntry, masks: Tensor | None, images: Tensor) -> np.ndarray:
    expected = (len(images), *images.shape[-2:])
    if masks is None:
        raise UsageError(
            f"parts: the parser {entry.name!r} expected masks of shape {expected}, got none; "
            "give the data set masks (dataset.masks) or choose another parser"
        )
    if masks.shape != expected or masks.is_floating_point():
        raise UsageError(
            f"parts: the parser {entry.name!r} expected integer masks of shape {expected}, got "
            f"{masks.dtype} of shape {tuple(masks.shape)}; Classifier.preprocess_mask makes them fit"
        )
    return masks.cpu().numpy()
