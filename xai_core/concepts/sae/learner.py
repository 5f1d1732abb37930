"""What one step of a training changes: parameters, Adam's moments, and what is known of every latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from xai_core.concepts.sae.gradients import Objective, Passed, backpropagate, revive
from xai_core.concepts.sae.model import Autoencoder
from xai_core.concepts.sae.resampling import resample
from xai_core.concepts.sae.variants import Variant

# Which latents are dead is looked up so often: each time the GPU is waited for.
_STEPS_BETWEEN_LOOKS = 20
# The inference threshold is a mean over about so many of the last batches, and the last tenth of a short training.
_THRESHOLD_BATCHES = 100
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """An autoencoder that learns, step by step, on the device of its parameters.

    ``silent`` ``[K]``: vectors since each latent fired; ``threshold``: mean floor of the last batches;
    ``finite``: whether all losses were, of which the first ``good_steps`` are.
    """

    def __init__(self, variant: Variant, options: Any, model: Autoencoder, seed: int) -> None:
        atoms, channels = model.W_d.shape
        device = model.W_d.device
        self.model, self.step = model, 0
        self._options = options
        self._objective = Objective(
            floor=_with_options(variant.floor, options),
            prefixes=variant.prefixes(options, atoms),
            penalty=variant.penalty(options, channels),
        )
        self._optimiser = torch.optim.Adam(
            [parameter.requires_grad_() for parameter in model.parameters.values()], fused=True
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._workspace = torch.empty(2, options.batch_size, atoms, device=device)
        self._newest = 1 / max(1, min(_THRESHOLD_BATCHES, options.steps // 10))
        self._resampled_after = options.resampling_steps()
        self.silent = torch.zeros(atoms, dtype=torch.int64, device=device)
        self.threshold = torch.zeros((), device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._dead = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def codes(self) -> Tensor:
        """The codes ``[B, K]`` of the last batch, until the next step."""
        return self._workspace[0]

    @property
    def learning_rate(self) -> float:
        """Adam's in the next step: up in a straight line for the warm-up, and down to zero over all steps."""
        options = self._options
        rising = min(1.0, (self.step + 1) / max(1.0, options.warm_up * options.steps))
        falling = 1 - self.step / options.steps
        return float(options.learning_rate / len(self.model.b_d) ** 0.5 * rising * falling)

    def learn(self, x: Tensor) -> Passed:
        """One step on vectors ``[B, C]`` of mean norm sqrt(C); what it returns is of the parameters before it."""
        passed = backpropagate(self.model, x, self._objective, *self._workspace)
        most, weight = self._options.revived(x.shape[1])
        if weight and len(self._dead):
            passed.loss.add_(revive(self.model, x, passed.error, self._dead, most, weight))
        self.finite &= passed.loss.isfinite()
        self.good_steps += self.finite
        self.silent.add_(len(x)).masked_fill_(passed.sums > 0, 0)
        self.threshold.lerp_(passed.floor, max(1 / (self.step + 1), self._newest))
        for group in self._optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.model.project_gradient()
        self._optimiser.step()
        self.model.normalise()
        self.step += 1
        self._look_after_dead(x, passed.error)
        return passed

    def dead(self) -> Tensor:
        """Which latents ``[K]`` have not fired for ``dead_after`` vectors."""
        return self.silent >= self._options.dead_after

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, but for the vectors; not copied."""
        moments = {
            f"{moment}.{name}": self._optimiser.state[parameter][moment]
            for name, parameter in self.model.parameters.items()
            if parameter in self._optimiser.state
            for moment in _MOMENTS
        }
        return {
            **self.model.parameters,
            **moments,
            "step": torch.tensor(self.step),
            "silent": self.silent,
            "threshold": self.threshold,
            "finite": self.finite,
            "good_steps": self.good_steps,
            "dead": self._dead,
            "generator": self._generator.get_state(),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state, the parameters of which it was made with; its tensors are taken over."""
        self.step = int(state["step"])
        for name, parameter in self.model.parameters.items():
            if f"{_MOMENTS[0]}.{name}" in state:
                step = torch.tensor(float(self.step), device=parameter.device)
                moments = {moment: state[f"{moment}.{name}"] for moment in _MOMENTS}
                self._optimiser.state[parameter] = {"step": step, **moments}
        self.silent, self.threshold = state["silent"], state["threshold"]
        self.finite, self.good_steps, self._dead = state["finite"], state["good_steps"], state["dead"]
        self._generator.set_state(state["generator"].cpu())

    def _look_after_dead(self, x: Tensor, error: Tensor) -> None:
        resampling = self.step in self._resampled_after
        if resampling or self.step % _STEPS_BETWEEN_LOOKS == 0:
            self._dead = self.dead().nonzero().flatten()
        if resampling:
            begun = resample(self.model, self._optimiser, self._dead, x, error, self._generator)
            self.silent.index_fill_(0, begun, 0)


def _with_options(
    floor: Callable[[Tensor, Any], Tensor] | None, options: Any
) -> Callable[[Tensor], Tensor] | None:
    return None if floor is None else lambda activations: floor(activations, options)
