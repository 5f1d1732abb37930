"""Layer-wise relevance propagation, in gradient form: convolutional networks and transformers."""

from xai_core.attribution.propagation import attn_lrp, lrp, srd
from xai_core.attribution.propagation.attn_lrp import AttnLrpOptions, attn_lrp_rules
from xai_core.attribution.propagation.lrp import lrp_rules

__all__ = ["AttnLrpOptions", "attn_lrp", "attn_lrp_rules", "lrp", "lrp_rules", "srd"]
