"""Superpixels of colour and place, without any network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xai_core.errors import UsageError
from xai_core.parts.parser import ParserInput
from xai_core.registry import parsers


@dataclass(frozen=True)
class SlicOptions:
    """``compactness``: weight of place against colour; ``sigma``: smoothing beforehand, in pixels."""

    compactness: float = 10.0
    sigma: float = 1.0


@parsers.register("slic", options=SlicOptions, paper="Achanta et al., SLIC superpixels, TPAMI 2012")
def slic(given: ParserInput, options: SlicOptions) -> np.ndarray:
    """SLIC superpixels of the picture, from exactly k seeds (Achanta et al. 2012)."""
    height, width = given.size
    if given.k > height * width:
        raise UsageError(
            f"parts.k: expected at most {height * width}, the pixels of a {height} x {width} image, "
            f"got {given.k}; ask for fewer parts"
        )
    return np.stack([_superpixels(picture, given.k, options) for picture in given.pictures])


def _superpixels(picture: np.ndarray, seeds: int, options: SlicOptions) -> np.ndarray:
    from skimage.segmentation import slic as superpixels

    return superpixels(
        picture,
        seeds,
        options.compactness,
        sigma=options.sigma,
        start_label=0,
        # Without a mask the seeds are a square grid, which for 12 means nine or sixteen.
        mask=np.ones(picture.shape[:2], dtype=bool),
        # It would swallow every superpixel below half the mean size; merge_fragments asks min_area instead.
        enforce_connectivity=False,
    ).astype(np.int64)
