"""Parts that somebody else has drawn: supervised parsers, annotations, trimaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xai_core.parts.labels import NO_PART, compact
from xai_core.parts.parser import ParserInput
from xai_core.registry import parsers


@dataclass(frozen=True)
class MaskOptions:
    """``ignore``: the mask values that belong to no part."""

    ignore: tuple[int, ...] = (0,)


@parsers.register("masks", options=MaskOptions, paper="KL-Hessian, section 4.1", needs=("masks",))
def mask_files(given: ParserInput, options: MaskOptions) -> np.ndarray:
    """The caller's integer masks: every value in an image is one part (KL-Hessian, section 4.1)."""
    if given.masks is None:
        raise TypeError("a parser that reads masks must be registered with needs=('masks',)")
    return np.stack([_named_values(mask, options.ignore) for mask in given.masks])


def _named_values(mask: np.ndarray, ignore: tuple[int, ...]) -> np.ndarray:
    """A mask may hold any integers, ``NO_PART`` among them: ids come from the values that are not ignored."""
    values, inverse = np.unique(mask, return_inverse=True)
    named = ~np.isin(values, list(ignore))
    # Values past a byte must not meet NO_PART before compact() has counted them.
    ids = np.where(named, np.arange(len(values)) + NO_PART + 1, NO_PART)
    return compact(ids[inverse].reshape(mask.shape)).astype(np.int64)
