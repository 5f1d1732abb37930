"""Gradients with respect to the input, and what is built from them; importing this package registers them."""

from xai_core.attribution.gradients import (
    deep_lift,
    full_grad,
    gradient,
    guided_backprop,
    integrated_gradients,
)

__all__ = ["deep_lift", "full_grad", "gradient", "guided_backprop", "integrated_gradients"]
