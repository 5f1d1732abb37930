"""Pictures of explanations: heat maps, overlays, part maps, sheets and graphs. They are returned, never saved."""

from xai_core.render.concept_sheet import Exemplars, concept_sheet, concept_tiles, evidence_region
from xai_core.render.graph_picture import Edge, GraphPicture, Node, graph_picture
from xai_core.render.heat_maps import heat_map, is_signed, strength
from xai_core.render.overlays import overlay
from xai_core.render.part_maps import part_colours, part_map, scored_parts
from xai_core.render.shares import share_overlay
from xai_core.render.sheet import explanation_sheet

__all__ = [
    "Edge",
    "Exemplars",
    "GraphPicture",
    "Node",
    "concept_sheet",
    "concept_tiles",
    "evidence_region",
    "explanation_sheet",
    "graph_picture",
    "heat_map",
    "is_signed",
    "overlay",
    "part_colours",
    "part_map",
    "scored_parts",
    "share_overlay",
    "strength",
]
