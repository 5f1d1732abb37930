"""Class activation maps; importing this package registers them."""

from xai_core.attribution.cam import ablation_cam, gradient_cam, score_cam

__all__ = ["ablation_cam", "gradient_cam", "score_cam"]
