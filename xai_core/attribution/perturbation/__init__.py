"""Methods that mask the image and read what the model says of it; none of them needs a gradient."""

from xai_core.attribution.perturbation import kernel_shap, lime, occlusion, rise

__all__ = ["kernel_shap", "lime", "occlusion", "rise"]
