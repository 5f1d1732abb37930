"""Errors that the user can mend: they say what was expected, what was got and what to do."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A request that cannot be carried out as written (a name, a layer, a shape, a checkpoint)."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """Names close to ``name`` as a phrase for an error message, or all names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(repr(one) for one in close) + "?"
    return "known: " + ", ".join(known)


class ImageError(RuntimeError):
    """One image cannot be treated, for a reason of its own: it can be set aside, its neighbours need not be."""


class OutOfMemory(ImageError):  # noqa: N818
    """An image does not fit in memory even when it is treated alone."""


class NotFinite(ImageError):  # noqa: N818
    """An image gives NaN or infinity where a number is needed."""
