"""Pictures of explanations: heat maps, overlays, part maps and sheets. They are returned, never saved."""

from xai_core.render.heat_maps import heat_map, is_signed, strength
from xai_core.render.overlays import overlay
from xai_core.render.part_maps import part_colours, part_map, scored_parts
from xai_core.render.shares import share_overlay
from xai_core.render.sheet import explanation_sheet

__all__ = [
    "explanation_sheet",
    "heat_map",
    "is_signed",
    "overlay",
    "part_colours",
    "part_map",
    "scored_parts",
    "share_overlay",
    "strength",
]
