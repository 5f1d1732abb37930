"""From encoded bytes to an RGB picture, refusing what is broken or absurdly large."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from storage.errors import SourceError

# 64 megapixels: four times a large camera picture, and 200 MB as RGB.
MAX_PIXELS = 64_000_000

# Preprocessing resizes the shorter side: a strip of 1 x 60000 would become gigabytes on the way.
MAX_ASPECT = 200

# Orientations that swap width and height (EXIF 2.3, tag 0x0112).
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)


def decode_image(content: bytes) -> Image.Image:
    """An upright RGB picture from encoded bytes; transparency is laid over white.

    Raises:
        SourceError: no bytes, no known picture format, a broken file, more than ``MAX_PIXELS``, or a side
            more than ``MAX_ASPECT`` times the other.
    """
    if not content:
        raise SourceError("expected an encoded picture, got 0 bytes")
    try:
        picture = Image.open(io.BytesIO(content))
        _refuse_huge(picture)
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture))
    except SourceError:
        raise
    except Image.DecompressionBombError as error:
        raise SourceError(f"expected at most {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:
        # Pillow's plugins raise whatever the broken bytes make them raise (SyntaxError, struct.error, ...).
        raise SourceError(f"not a readable picture: {type(error).__name__}: {error}") from error


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as :func:`decode_image` gives it, without reading its pixels."""
    width, height = picture.size
    return (height, width) if picture.getexif().get(ORIENTATION) in TURNED else (width, height)


def _refuse_huge(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise SourceError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SourceError(f"expected a side at most {MAX_ASPECT} times the other, got {width} x {height}")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow clips 16-bit values on conversion instead of scaling them.
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
