"""Decoding: every odd picture becomes upright RGB or a clear refusal."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from storage.errors import SourceError
from storage.sources import decode_image
from storage.sources.decode import upright_size
from tests.conftest import picture
from tests.memory import MIB, memory_left, needs_limits, short_of_memory


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with next to no data behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_pictures_come_back_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode_image(encoded(picture(0), kind, **options))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture(0)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got 0 bytes"),
        (b"not a picture at all", "of no known format, it begins with b'not a picture at all'"),
        (encoded(picture(0), "JPEG")[:-200], "not a readable picture: OSError"),
        (encoded(picture(0), "JPEG")[:10], "not a readable picture"),
        (encoded(picture(0), "PNG")[:-40], "not a readable picture"),
        (encoded(picture(0), "PNG")[:40], "not a readable picture"),
        (png_claiming(20_000, 20_000), r"expected at most 64000000 pixels"),
        (png_claiming(8_001, 8_000), r"expected at most 64000000 pixels, got 8001 x 8000"),
        (png_claiming(60_000, 1), r"expected a side at most 200 times the other, got 60000 x 1"),
    ],
    ids=["empty", "text", "cut jpeg", "cut head", "cut png", "cut chunk", "bomb", "huge", "strip"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_is_refused_with_its_reason(content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        decode_image(content)


def test_every_cut_of_a_picture_is_refused_or_decoded_but_never_crashes() -> None:
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = encoded(picture(1), kind)
        for length in range(0, len(whole), 97):
            try:
                decode_image(whole[:length])
            except SourceError:
                continue


def test_cmyk_becomes_rgb() -> None:
    found = decode_image(encoded(picture(0).convert("CMYK"), "JPEG", quality=95))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(picture(0)).astype(int)).mean() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    np.testing.assert_array_equal(found[..., 0], found[..., 2])
    assert np.abs(found[..., 0].astype(int) - (ramp >> 8).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_the_same_in_every_format(kind: str) -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = np.asarray(decode_image(encoded(Image.fromarray(ramp), kind)))
    np.testing.assert_array_equal(found, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_the_transparent_one_of_sixteen_bit_greys_is_white_and_no_other() -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = np.asarray(decode_image(encoded(Image.fromarray(ramp), "PNG", transparency=640)))[..., 0]
    np.testing.assert_array_equal(found, np.where(ramp == 640, 255, ramp >> 8))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_white_are_refused(kind: type) -> None:
    with pytest.raises(SourceError, match="expected 8 or 16 bits a channel, got 32"):
        decode_image(encoded(Image.fromarray(np.ones((4, 4), kind)), "TIFF"))


def test_postscript_is_not_handed_to_an_interpreter() -> None:
    with pytest.raises(SourceError, match=r"of no known format, it begins with b'%!PS-Adobe-3\.0 EPSF-3\.0"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_the_same_broken_bytes_are_refused_in_the_same_words() -> None:
    content = b"this is no picture"
    words = set()
    for _ in range(3):
        with pytest.raises(SourceError) as told:
            decode_image(bytes(bytearray(content)))
        words.add(str(told.value))
    assert len(words) == 1 and " at 0x" not in words.pop()


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encoded(clear)).getpixel((1, 1)) == (255, 255, 255)
    assert decode_image(encoded(half)).getpixel((1, 1)) == (127, 127, 127)


def test_a_palette_with_a_transparent_entry_is_laid_over_white() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (2, 0, 4, 2))
    found = decode_image(encoded(image, "PNG", transparency=0))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((3, 0)) == (0, 0, 255)


def test_exif_orientation_is_applied() -> None:
    stored = np.asarray(picture(3, width=40, height=24))
    # What EXIF says of the stored rows and columns, as numpy turns them.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
        9: stored,
    }
    for kind in ("PNG", "TIFF"):
        for orientation, expected in upright.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            content = encoded(Image.fromarray(stored), kind, exif=exif)
            np.testing.assert_array_equal(np.asarray(decode_image(content)), expected, f"{kind} {orientation}")
            with Image.open(io.BytesIO(content)) as opened:
                assert upright_size(opened) == expected.shape[1::-1]


def test_a_picture_of_one_pixel_is_a_picture() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode_image(encoded(Image.new(mode, (5, 3)))).mode == "RGB"


def test_the_first_frame_of_an_animation_is_the_picture() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("lime", "red")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content).getpixel((0, 0)) == (0, 255, 0)


@needs_limits
@short_of_memory
@pytest.mark.parametrize("mode", ["RGB", "1"])
def test_a_picture_without_room_for_it_is_not_called_broken(mode: str) -> None:
    """Its pixels do not fit (RGB), or only once they are three bytes each."""
    content = encoded(Image.new(mode, (7000, 7000)))
    with memory_left(80 * MIB), pytest.raises(MemoryError):
        decode_image(content)
    assert decode_image(content).size == (7000, 7000)
