"""Whether a network was left as it was."""

from __future__ import annotations

from typing import Any

from torch import nn

from xai_core.models import weights_digest


def state_of(module: nn.Module) -> dict[str, Any]:
    """What a method could leave changed: weights, hooks, replaced forwards, modes and flags."""
    flags = {
        name: (
            child.training,
            getattr(child, "inplace", None),
            getattr(child, "fused_attn", None),
            "forward" in vars(child),
            [len(hooks) for key, hooks in vars(child).items() if key.endswith("_hooks") and hooks],
            [(parameter.requires_grad, parameter.grad is None) for parameter in child.parameters(recurse=False)],
        )
        for name, child in module.named_modules()
    }
    return {"weights": weights_digest(module), "flags": flags}
