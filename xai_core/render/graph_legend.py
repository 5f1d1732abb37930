"""The legend below a layered graph: groups, the scale of the edges, and what is not drawn."""

from __future__ import annotations

from html import escape

from xai_core.render.graph_svg import BOX, MARGIN, QUIET, SMALL, Drawing, stroke_of, text
from xai_core.render.text import shortened, text_width

SHARES = (0.1, 0.5, 1.0)
SAMPLE = 26.0
ROW = 19.0
BETWEEN = 14.0


def legend_of(drawing: Drawing) -> tuple[list[str], float]:
    """The legend's elements and the height at which the picture ends."""
    room = drawing.width - 2 * MARGIN
    items = [_group(name, colour, room) for name, colour in drawing.groups.items()]
    items.append(_words("edge, as a share of the strongest between its two layers:", room))
    items += [_edge(f"{share:.0%}", share, 1.0) for share in SHARES]
    if any(edge.weight < 0 for edge in drawing.edges):
        items.append(_edge("negative", SHARES[1], -1.0))
    if drawing.left_out:
        many = "1 edge" if drawing.left_out == 1 else f"{drawing.left_out} edges"
        items.append(_words(f"not drawn: {many} below {drawing.least_share:.0%}", room))
    found, x, y = [], 0.0, drawing.bottom + ROW
    for width, drawn in items:
        if x and x + width > room:
            x, y = 0.0, y + ROW
        found.append(f'<g transform="translate({MARGIN + x:g} {y:g})">{drawn}</g>')
        x += width + BETWEEN
    return found, y + ROW


def _words(words: str, room: float) -> tuple[float, str]:
    shown = shortened(words, room, SMALL)
    return text_width(shown, SMALL), text(0, 3.5, shown, SMALL, QUIET)


def _group(name: str, colour: str, room: float) -> tuple[float, str]:
    shown = shortened(name, min(room, 2 * BOX[0]) - 16, SMALL)
    swatch = f'<title>{escape(name)}</title><rect y="-5" width="10" height="10" rx="3" style="fill:{colour}"/>'
    return 16 + text_width(shown, SMALL), swatch + text(16, 3.5, shown, SMALL, QUIET)


def _edge(words: str, share: float, weight: float) -> tuple[float, str]:
    line = f'<path d="M0 0H{SAMPLE:g}" {stroke_of(share, weight)}/>'
    return SAMPLE + 5 + text_width(words, SMALL), line + text(SAMPLE + 5, 3.5, words, SMALL, QUIET)
