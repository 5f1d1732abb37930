"""AdamW under a schedule that knows its step and nothing else, with a state of tensors alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from xai_core.errors import UsageError
from xai_core.training.recipe import Recipe

BETAS = (0.9, 0.999)
# Where the rate ends, as a share of the recipe's: a cosine between two equal rates is constant.
_ENDS = {"cosine": 0.0, "constant": 1.0}


class Optimiser:
    """AdamW over the parameters of a module that require gradients.

    Raises:
        UsageError: none of them does.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, steps: int) -> None:
        self._parameters = [one for one in module.parameters() if one.requires_grad]
        if not self._parameters:
            raise UsageError(
                "training: expected parameters that require gradients, got none: nothing would be learnt"
            )
        rate = recipe.learning_rate
        self._adam = torch.optim.AdamW(self._parameters, rate, betas=BETAS, weight_decay=recipe.weight_decay)
        warm_up = min(int(recipe.warm_up * steps), steps - 1)
        self._schedule = CosineLRScheduler(
            self._adam,
            t_initial=steps - warm_up,
            lr_min=rate * _ENDS[recipe.schedule],
            warmup_t=warm_up,
            warmup_lr_init=rate / (warm_up + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self._adam.param_groups[0]["lr"])

    def step(self, loss: Tensor, number: int) -> None:
        """Moves the parameters against the gradient of a loss, at the rate of step ``number``, from 0."""
        self._schedule.step_update(number)
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """The moments of every parameter, and how often it was moved, as ``number.name``."""
        state = self._adam.state_dict()["state"]
        return {f"{number}.{name}": value for number, of in state.items() for name, value in of.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a :meth:`state`."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        self._adam.load_state_dict({"state": moments, "param_groups": self._adam.state_dict()["param_groups"]})
