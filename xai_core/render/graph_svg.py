"""The SVG of a layered graph: boxes, edges and headings, from a layout that is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from xai_core.render.graph_layout import heights
from xai_core.render.graph_parts import Edge, Node
from xai_core.render.text import one_line, shortened, text_width, wrapped

# In the picture's own units; a page that gives it this width shows text at its nominal size.
BOX = (126.0, 46.0)
PITCH = 58.0
MARGIN = 10.0
SMALLEST_GAP = 72.0
SMALLEST_WIDTH = 460.0
HEAD = 40.0
THUMBNAIL = 38.0
PAD = 8.0
BAR = 3.0
LABEL, HEADING, SMALL = 11.5, 12.0, 10.0
LINE = 14.0

# An edge from the weakest to the strongest.
WIDTHS = (0.8, 8.0)
OPACITIES = (0.2, 1.0)
# The ends of a box's edges stand apart by this, as far as the box is high enough.
PORT = 5.0

# None of them is the blue or the orange of the edges.
GROUP_COLOURS = ("#009e73", "#aa3377", "#b08800", "#5a9fc0", "#7f6bd6", "#8c8c8c")

INK = "var(--ink,#171a21)"
QUIET = "var(--quiet,#566072)"
CARD = "var(--card,#ffffff)"
FRAME = ' class="frame" fill="none" stroke-width="1.5"'
PLAIN = "var(--line,#c9d0db)"
POSITIVE = "var(--accent,#3457d5)"
NEGATIVE = "var(--against,#d55e00)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Drawing:
    """A graph whose order is settled; ``edges`` are those to draw, with their shares of the strongest."""

    title: str
    name: str
    layers: tuple[str, ...]
    columns: Sequence[Sequence[str]]
    nodes: Mapping[str, Node]
    edges: Mapping[Edge, float]
    strongest: Mapping[tuple[str, str], float]
    left_out: int
    least_share: float

    @property
    def groups(self) -> dict[str, str]:
        """Groups with their colours: those of the last layer, the classes, come first."""
        late_first = sorted(self.nodes.values(), key=lambda node: -self.layers.index(node.layer))
        names = dict.fromkeys(node.group for node in late_first if node.group)
        return dict(zip(names, GROUP_COLOURS, strict=False))

    @property
    def bottom(self) -> float:
        """Where the nodes end."""
        return HEAD + PITCH * max(map(len, self.columns))

    @property
    def gap(self) -> float:
        """Between two columns."""
        gaps = len(self.layers) - 1
        return max(SMALLEST_GAP, (SMALLEST_WIDTH - 2 * MARGIN - len(self.layers) * BOX[0]) / gaps)

    @property
    def width(self) -> float:
        """Of the whole picture."""
        return 2 * MARGIN + len(self.layers) * (BOX[0] + self.gap) - self.gap

    def left(self, layer: int) -> float:
        """Of a column."""
        return MARGIN + layer * (BOX[0] + self.gap)


def svg_of(drawing: Drawing, legend: Sequence[str], height: float) -> str:
    """The whole picture with its legend, nothing in it comes from elsewhere."""
    middles = {node: HEAD + place for node, place in heights(drawing.columns, PITCH).items()}
    name, title = escape(drawing.name), escape(one_line(drawing.title))
    told = (
        f"{len(drawing.layers)} layers from left to right, {len(drawing.nodes)} nodes, "
        f"{len(drawing.edges)} edges, {drawing.left_out} weaker ones not drawn"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="concept-graph" viewBox="0 0 {drawing.width:g} '
            f'{height:g}" width="{drawing.width:g}" height="{height:g}" role="group" '
            f'style="--natural:{drawing.width:g}px" '
            f'aria-labelledby="{name}-title {name}-told" font-family="{FONT}">',
            f'<title id="{name}-title">{title}</title>',
            f'<desc id="{name}-told">{told}</desc>',
            f'<defs><clipPath id="{name}-box">{box("", "")}</clipPath></defs>',
            *_headings(drawing),
            *_edges(drawing, middles),
            *_boxes(drawing, middles),
            *legend,
            "</svg>",
        ]
    )


def text(x: float, y: float, words: str, size: float, fill: str = INK, anchor: str = "start") -> str:
    """A line of text as it is."""
    place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"'
    return f'<text {place} style="fill:{fill}">{escape(words)}</text>'


def box(look: str, style: str) -> str:
    """The outline of a node."""
    return f'<rect width="{BOX[0]:g}" height="{BOX[1]:g}" rx="8"{look} style="{style}"/>'


def stroke_of(share: float, weight: float) -> str:
    """How an edge of a share looks, by the sign of its weight."""
    width, opacity = (low + share * (high - low) for low, high in (WIDTHS, OPACITIES))
    dashes = "" if weight >= 0 else f' stroke-dasharray="{3 + width:.3g} {2 + width / 2:.3g}"'
    colour = POSITIVE if weight >= 0 else NEGATIVE
    return f'fill="none" stroke-width="{width:.3g}" stroke-opacity="{opacity:.3g}"{dashes} style="stroke:{colour}"'


def _headings(drawing: Drawing) -> list[str]:
    found = []
    for index, layer in enumerate(drawing.layers):
        shown = shortened(layer, BOX[0] + drawing.gap - 12, HEADING, keep_end=True)
        middle = drawing.left(index) + BOX[0] / 2
        # The ends of the outer headings would leave the picture.
        half = min(text_width(shown, HEADING) / 2, BOX[0] / 2 + MARGIN)
        if text_width(shown, HEADING) / 2 > half and index in (0, len(drawing.layers) - 1):
            shown = shortened(layer, 2 * half, HEADING, keep_end=True)
        found.append(
            f"<g><title>{escape(one_line(layer))}</title>{text(middle, 14, shown, HEADING, QUIET, 'middle')}</g>"
        )
        pair = drawing.layers[index : index + 2]
        if len(pair) == 2 and (strongest := drawing.strongest.get((pair[0], pair[1]), 0.0)) > 0:
            words = shortened(f"max {strongest:.3g}", drawing.gap - 4, SMALL)
            found.append(text(middle + (BOX[0] + drawing.gap) / 2, 30, words, SMALL, QUIET, "middle"))
    return found


def _edges(drawing: Drawing, middles: Mapping[str, float]) -> list[str]:
    """Weak ones first, so that strong ones lie above."""
    leaving = _ports([(edge.source, edge.target, edge) for edge in drawing.edges], middles)
    arriving = _ports([(edge.target, edge.source, edge) for edge in drawing.edges], middles)
    column = {node: index for index, members in enumerate(drawing.columns) for node in members}
    found = []
    for edge, share in sorted(drawing.edges.items(), key=lambda item: item[1]):
        x0, x1 = drawing.left(column[edge.source]) + BOX[0], drawing.left(column[edge.target])
        y0, y1, bend = leaving[edge], arriving[edge], (x0 + x1) / 2
        ends = (drawing.nodes[edge.source], drawing.nodes[edge.target])
        told = " → ".join(one_line(end.label) for end in ends)
        found.append(
            f'<path class="edge" data-source="{escape(edge.source)}" data-target="{escape(edge.target)}" '
            f'd="M{x0:g} {y0:g}C{bend:g} {y0:g} {bend:g} {y1:g} {x1:g} {y1:g}" {stroke_of(share, edge.weight)}>'
            f"<title>{escape(told)}: {edge.weight:.3g} ({share:.0%} of the strongest of {escape(ends[0].layer)} → "
            f"{escape(ends[1].layer)})</title></path>"
        )
    return found


def _ports(ends: Sequence[tuple[str, str, Edge]], middles: Mapping[str, float]) -> dict[Edge, float]:
    """The height at which each edge meets its box: apart, in the order of their other ends."""
    of_node: dict[str, list[tuple[float, Edge]]] = {}
    for node, other, edge in ends:
        of_node.setdefault(node, []).append((middles[other], edge))
    found = {}
    for node, others in of_node.items():
        apart = min(PORT, (BOX[1] - 2 * PAD) / len(others))
        for index, (_, edge) in enumerate(sorted(others, key=lambda item: item[0])):
            found[edge] = round(middles[node] + apart * (index - (len(others) - 1) / 2), 2)
    return found


def _boxes(drawing: Drawing, middles: Mapping[str, float]) -> list[str]:
    strongest: dict[str, float] = {}
    for node in drawing.nodes.values():
        strongest[node.layer] = max(strongest.get(node.layer, 0.0), abs(node.weight or 0.0))
    return [
        _box(drawing, drawing.nodes[id], drawing.left(index), middles[id] - BOX[1] / 2, strongest[layer])
        for index, (layer, column) in enumerate(zip(drawing.layers, drawing.columns, strict=True))
        for id in column
    ]


def _box(drawing: Drawing, node: Node, left: float, top: float, strongest: float) -> str:
    colour = drawing.groups.get(node.group, PLAIN)
    told = [one_line(node.label), one_line(node.layer)]
    told += [f"attribution {node.weight:.3g}"] if node.weight is not None else []
    told += [one_line(node.group)] if node.group else []
    tag = f'a href="#{escape(node.anchor)}"' if node.anchor else 'g tabindex="0" role="img"'
    start = THUMBNAIL + PAD if node.thumbnail else 0.0
    inside = [box("", f"fill:{CARD}")]
    inside += [box(' fill-opacity="0.12"', f"fill:{colour}")] if node.group else []
    if node.thumbnail:
        inside.append(
            f'<image x="{PAD / 2:g}" y="{(BOX[1] - THUMBNAIL) / 2:g}" width="{THUMBNAIL:g}" '
            f'height="{THUMBNAIL:g}" href="{escape(node.thumbnail)}"/>'
        )
    lines = wrapped(node.label, BOX[0] - start - 2 * PAD, LABEL, 2)
    middle = BOX[1] / 2 + 4 - LINE * (len(lines) - 1) / 2
    inside += [text(start + PAD, middle + LINE * row, line, LABEL) for row, line in enumerate(lines)]
    if node.weight is not None and strongest > 0:
        length = (BOX[0] - start) * abs(node.weight) / strongest
        fill = NEGATIVE if node.weight < 0 else colour if node.group else POSITIVE
        inside.append(
            f'<rect class="weight" x="{start:g}" y="{BOX[1] - BAR:g}" width="{length:.4g}" height="{BAR:g}" '
            f'style="fill:{fill}"/>'
        )
    return (
        f'<{tag} class="node" data-node="{escape(node.id)}" aria-label="{escape(", ".join(told))}" '
        f'transform="translate({left:g} {top:g})"><title>{escape(chr(10).join(told))}</title>'
        f'<g clip-path="url(#{escape(drawing.name)}-box)">{"".join(inside)}</g>'
        f"{box(FRAME, f'stroke:{colour}')}</{tag[0]}>"
    )
