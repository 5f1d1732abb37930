"""Attribution methods that read a vision transformer's attention, one file an idea; importing registers them."""

from xai_core.attribution.attention import (
    bi_attention,
    generic_attention,
    information_flow,
    rollout,
    t_lrp,
    token_tm,
    transformer_attribution,
)

__all__ = [
    "bi_attention",
    "generic_attention",
    "information_flow",
    "rollout",
    "t_lrp",
    "token_tm",
    "transformer_attribution",
]
