"""A concept graph as a layered picture in SVG: columns by layer, edges by weight, nodes that can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xai_core.errors import UsageError
from xai_core.render.graph_layout import ordered
from xai_core.render.graph_legend import legend_of
from xai_core.render.graph_parts import Edge, Node, refuse
from xai_core.render.graph_svg import GROUP_COLOURS, Drawing, svg_of

__all__ = ["LEAST_SHARE", "Edge", "GraphPicture", "Node", "graph_picture"]

# Edges below this share of the strongest one between the same two layers are not drawn.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class GraphPicture:
    """A graph as SVG text with ``edges`` in it; ``left_out`` ones are too weak to be drawn."""

    svg: str
    edges: int
    left_out: int


def graph_picture(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    layers: Sequence[str],
    *,
    title: str,
    name: str = "graph",
    least_share: float = LEAST_SHARE,
) -> GraphPicture:
    """Draws a layered concept graph (iERF, figure 9: the thicker and bluer an edge, the stronger).

    Width and colour of an edge follow its share of the strongest edge between the same two layers, because
    weights of different pairs (cosines, logits) have no scale in common; that strongest weight is written
    between the layers. Negative edges are orange and dashed. Within a layer, nodes stand so that strong edges
    cross little. Text that does not fit its box is cut, and whole in the box's title. Colours are the page's
    (its CSS variables), or those of a light page where it has none.

    Args:
        nodes: at most 12 a layer; edges: from an earlier to a later layer, not necessarily the next.
        layers: from early to late, 2 to 8, each with a node.
        title: what the picture shows, for those who do not see it too.
        name: an id that no other graph on the page has.
        least_share: in [0, 1); weaker edges are left out, and their count is written below.

    Raises:
        UsageError: too few or too many layers, nodes or groups, nodes that share an id, weights that are not
            finite, edges that end nowhere, come twice or run backwards, or a thumbnail that is no data URI.
    """
    refuse(nodes, edges, layers, len(GROUP_COLOURS))
    if not 0.0 <= least_share < 1.0:
        raise UsageError(f"least_share: expected a number in [0, 1), got {least_share}")
    of = {node.id: node for node in nodes}
    strongest: dict[tuple[str, str], float] = {}
    for edge in edges:
        pair = (of[edge.source].layer, of[edge.target].layer)
        strongest[pair] = max(strongest.get(pair, 0.0), abs(edge.weight))
    shares = {edge: _share(edge, strongest[of[edge.source].layer, of[edge.target].layer]) for edge in edges}
    shown = {edge: share for edge, share in shares.items() if share > 0 and share >= least_share}
    columns = ordered(
        [[node.id for node in nodes if node.layer == layer] for layer in layers],
        [(edge.source, edge.target, share) for edge, share in shown.items()],
    )
    drawing = Drawing(
        title, name, tuple(layers), columns, of, shown, strongest, len(edges) - len(shown), least_share
    )
    return GraphPicture(svg_of(drawing, *legend_of(drawing)), len(shown), drawing.left_out)


def _share(edge: Edge, strongest: float) -> float:
    return abs(edge.weight) / strongest if strongest > 0 else 0.0
