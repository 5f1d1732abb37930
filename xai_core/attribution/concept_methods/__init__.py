"""Methods that learn concepts from data before they explain; importing this package registers them."""

from xai_core.attribution.concept_methods import hu_mcd, visual_tcav

__all__ = ["hu_mcd", "visual_tcav"]
