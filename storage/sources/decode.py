"""From encoded bytes to an RGB picture, refusing what is broken or absurdly large."""

from __future__ import annotations

import io
import re
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from storage.errors import SourceError

# 64 megapixels: four times a large camera picture, and 200 MB as RGB.
MAX_PIXELS = 64_000_000

# Preprocessing resizes the shorter side: a strip of 1 x 60000 would become gigabytes on the way.
MAX_ASPECT = 200

# What is tried on an image's bytes, whatever its name says. Pillow knows more, among them PostScript, which it
# hands to another program to run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

# How many bytes of something else are shown.
SHOWN_BYTES = 24

# What each orientation takes to stand upright (EXIF 2.3, tag 0x0112); the last four swap width and height.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> Image.Image:
    """An upright RGB picture from encoded bytes; transparency is laid over white.

    Raises:
        SourceError: no bytes, no known picture format, a broken file, more than ``MAX_PIXELS``, or a side
            more than ``MAX_ASPECT`` times the other.
        MemoryError: it does not fit in memory.
    """
    picture = open_picture(content)
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
        upright = _to_rgb(picture)
        return upright if turn is None else upright.transpose(turn)
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(error) from error


def open_picture(content: bytes) -> Image.Image:
    """The picture in encoded bytes as it is stored, its pixels read; for errors see :func:`decode_image`."""
    if not content:
        raise SourceError("expected an encoded picture, got 0 bytes")
    try:
        picture = Image.open(io.BytesIO(content), formats=_formats())
        _refuse_huge(picture)
        picture.load()
        return picture
    except (SourceError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        claimed = re.search(r"\((\d+) pixels\)", str(error))
        got = claimed[1] if claimed else "several times as many"
        raise SourceError(f"expected at most {MAX_PIXELS} pixels, got {got}") from error
    except UnidentifiedImageError as error:
        raise SourceError(
            f"not a readable picture: of no known format, it begins with {content[:SHOWN_BYTES]!r}"
        ) from error
    except Exception as error:
        # Pillow's plugins raise whatever the broken bytes make them raise (SyntaxError, struct.error, ...).
        raise _unreadable(error) from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unreadable(error: Exception) -> SourceError:
    """The same broken bytes give the same words: Pillow's may tell where in memory an object was."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    return SourceError(f"not a readable picture: {type(error).__name__}: {text}")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as :func:`decode_image` gives it, without reading its pixels."""
    width, height = picture.size
    # Pillow turns a TIFF itself when it reads it, and has turned its size already.
    turned = picture.format != "TIFF" and picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _refuse_huge(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise SourceError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SourceError(f"expected a side at most {MAX_ASPECT} times the other, got {width} x {height}")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        return _from_sixteen_bits(picture)
    if picture.mode in ("I", "F"):
        raise SourceError(
            f"expected 8 or 16 bits a channel, got 32 (mode {picture.mode}), of which nobody knows what is white; "
            "convert it"
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _from_sixteen_bits(picture: Image.Image) -> Image.Image:
    """The upper byte of every grey value (Pillow's conversion clips them); the transparent value is white."""
    values = np.asarray(picture)
    grey = (values >> 8).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
