"""Setting an image aside: from what went wrong to what its row in ``quarantine`` says."""

from __future__ import annotations

from storage.errors import SourceError
from tasks.stage import Bad
from xai_core.errors import ImageError

# What makes one image bad and leaves the others as they are; any other error is the whole unit's.
IMAGE_ERRORS = (OSError, SourceError, MemoryError, ImageError)


def set_aside(image_id: int, path: str, error: Exception) -> Bad:
    """An image with the reason why it could not be treated, in words that are the same every time."""
    name = "OutOfMemory" if isinstance(error, MemoryError) else type(error).__name__
    return Bad(image_id, path, name, _printable(_reason(error)))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"does not fit in memory even alone: {str(error) or 'an allocation failed'}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return str(error)


def _printable(text: str) -> str:
    """Text that a table can hold: file names may have bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()
