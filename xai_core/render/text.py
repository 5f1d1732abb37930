"""Text that fits: measured in DejaVu Sans, about the widest of the fonts that pages and figures use."""

from __future__ import annotations

from functools import cache
from typing import Any
from unicodedata import east_asian_width

# Ems of a character that fills a square: DejaVu Sans has none of them, other fonts draw them so.
WIDE = 1.0

_MEASURED_AT = 100


@cache
def _font(bold: bool) -> Any:
    from pathlib import Path

    from matplotlib import get_data_path
    from PIL import ImageFont

    file = Path(get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(file, _MEASURED_AT, layout_engine=ImageFont.Layout.BASIC)


@cache
def _ems(character: str, bold: bool) -> float:
    if east_asian_width(character) in "WF":
        return WIDE
    return float(_font(bold).getlength(character)) / _MEASURED_AT


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """The width of a line of text in the unit of its font size; kerning, which only narrows it, left out."""
    return size * sum(_ems(character, bold) for character in text)


def one_line(text: str) -> str:
    """A text with every run of white space as one blank, and without what cannot be shown."""
    return "".join(one for one in " ".join(text.split()) if one.isprintable())


def shortened(text: str, room: float, size: float, *, bold: bool = False, keep_end: bool = False) -> str:
    """A line of text that is no wider than ``room``: an ellipsis stands for what is cut off its end or start."""
    text = one_line(text)
    if text_width(text, size, bold=bold) <= room:
        return text
    for kept in range(len(text) - 1, 0, -1):
        cut = f"…{text[-kept:].lstrip()}" if keep_end else f"{text[:kept].rstrip()}…"
        if text_width(cut, size, bold=bold) <= room:
            return cut
    return "…"


def wrapped(text: str, room: float, size: float, lines: int) -> list[str]:
    """A text on at most so many lines, broken between words; the last line, and a word too wide, are cut."""
    words = one_line(text).split()
    found: list[str] = []
    while words and len(found) < lines - 1:
        count = 1
        while count < len(words) and text_width(" ".join(words[: count + 1]), size) <= room:
            count += 1
        found.append(shortened(" ".join(words[:count]), room, size))
        words = words[count:]
    return [*found, shortened(" ".join(words), room, size)] if words else found
