"""Instance-specific effective receptive fields (iERF): which pixels drive a vector or a latent in a network."""

from xai_core.receptive_fields import integrated_gradients, kernel_shap, one_backward
from xai_core.receptive_fields.attributors import AttributorEntry, attributors
from xai_core.receptive_fields.fields import receptive_fields
from xai_core.receptive_fields.passes import output_of
from xai_core.receptive_fields.scalars import Latents, Scalars, feature_vectors, latents, settled

__all__ = [
    "AttributorEntry",
    "Latents",
    "Scalars",
    "attributors",
    "feature_vectors",
    "integrated_gradients",
    "kernel_shap",
    "latents",
    "one_backward",
    "output_of",
    "receptive_fields",
    "settled",
]
