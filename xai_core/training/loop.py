"""One training loop for whatever has an objective: streamed, logged, and resumable to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.errors import UsageError
from xai_core.precision import precision_context
from xai_core.training.augmentation import augment
from xai_core.training.chance import stream
from xai_core.training.evaluation import LabelledPictures, Pictures, evaluate, matched, picked
from xai_core.training.modes import training_modes
from xai_core.training.objective import Objective
from xai_core.training.optimiser import Optimiser
from xai_core.training.packing import as_tensor, as_text, below, copied, under
from xai_core.training.recipe import Recipe

Split = Literal["train", "held_out", "test"]


@dataclass(frozen=True)
class LogRow:
    """A value at the end of an epoch, from 1, after so many steps; of ``train``, the mean of its batches."""

    epoch: int
    step: int
    split: Split
    name: str
    value: float


class Training:
    """An objective on its way to weights.

    ``advance`` until ``done``, then take the ``weights``. A training that was stopped goes on from its ``state``
    and ends in the same weights and log, bit for bit, on the same machine with as many threads. Every epoch takes
    the pictures in an order of its own; those that fill no whole batch are left to the next.

    Args:
        objective: its ``trained`` module lies on the device; those of its parameters that require gradients learn.
        pictures: uint8 ``[N, 3, H, W]``, indexed by lists of rows: a tensor, an array, or a file of more than fits
            in memory. labels: ``[N]``.
        held_out: pictures and labels to measure after every epoch; the best one's weights are kept.
        device: where it is computed; the pictures may lie elsewhere.
        state: of the training that this one continues; the objective must be built as it was then.

    Raises:
        UsageError: no pictures, labels that are not as many, nothing to learn, or the state of another training.
    """

    def __init__(
        self,
        objective: Objective,
        pictures: Pictures,
        labels: Tensor,
        recipe: Recipe,
        *,
        held_out: LabelledPictures | None = None,
        device: str | torch.device = "cpu",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._objective, self._recipe, self._device = objective, recipe, torch.device(device)
        self._pictures, self._labels = matched(pictures, labels, "pictures")
        self._held_out = None if held_out is None else matched(*held_out, "held_out")
        self.steps_per_epoch = max(1, len(self._labels) // recipe.batch_size)
        self.steps = recipe.epochs * self.steps_per_epoch
        self._optimiser = Optimiser(objective.trained, recipe, self.steps)
        self._identity = self._describe()
        self._step = 0
        self._log: list[LogRow] = []
        self._sums: dict[str, Tensor] = {}
        self._good_steps = torch.zeros((), dtype=torch.int64, device=self._device)
        self._bad_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._best: dict[str, Tensor] = {}
        self._best_epoch: int | None = None
        self._best_score = -float("inf")
        self._saved: int | None = None
        self._order: tuple[int, list[int]] | None = None
        if state is not None:
            self._resume(state)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._step

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._step // self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self._step >= self.steps

    @property
    def log(self) -> list[LogRow]:
        """What every epoch so far saw: the means of its batches, and of the held-out pictures after it."""
        return list(self._log)

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, whose weights are taken: the first with the highest held-out score, else the last."""
        return self.epoch if self._best_epoch is None else self._best_epoch

    def advance(self, steps: int | None = None) -> None:
        """Trains so many steps further (None: to the end).

        Raises:
            UsageError: the loss is not finite; the message names the step and the last state that was taken.
        """
        last = self.steps if steps is None else min(self.steps, self._step + steps)
        trained = self._objective.trained
        with training_modes("fp32", self._device):
            trained.train()
            while self._step < last:
                self._learn()
                if self._step % self.steps_per_epoch == 0:
                    self._end_epoch()
                    trained.train()
            trained.eval()
            self._refuse_divergence()

    def weights(self) -> dict[str, Tensor]:
        """The module's state, copied to the CPU: of the best epoch, or as it is now where nothing is held out.

        Raises:
            UsageError: the loss, or a weight, is not finite.
        """
        self._refuse_divergence(weights=True)
        return {name: copied(tensor) for name, tensor in (self._best or self._module_state()).items()}

    def state(self) -> dict[str, Tensor]:
        """All that the rest of the training depends on, as a flat mapping of tensors on the CPU.

        Raises:
            UsageError: the loss, or a weight, is not finite.
        """
        self._refuse_divergence(weights=True)
        self._saved = self._step
        books = {"step": self._step, "epoch": self._best_epoch, "score": self._best_score}
        found = {
            "identity": as_tensor(self._identity),
            "books": as_tensor(json.dumps({**books, "log": [astuple(row) for row in self._log]})),
            **under("module", self._module_state()),
            **under("optimiser", self._optimiser.state()),
            **under("sums", self._sums),
            **under("best", self._best),
        }
        return {name: copied(tensor) for name, tensor in found.items()}

    def _resume(self, state: Mapping[str, Tensor]) -> None:
        identity = as_text(state["identity"]) if "identity" in state else "no training"
        if identity != self._identity:
            raise UsageError(
                f"state: expected one of {self._identity}, got one of {identity}; resume with the same objective, "
                "pictures and recipe, or start anew"
            )
        books = json.loads(as_text(state["books"]))
        self._step, self._best_epoch, self._best_score = books["step"], books["epoch"], books["score"]
        self._log = [LogRow(*row) for row in books["log"]]
        self._objective.trained.load_state_dict(below("module", state))
        self._optimiser.load(below("optimiser", state))
        self._sums = {name: one.to(self._device) for name, one in below("sums", state).items()}
        self._best = {name: one.to(self._device) for name, one in below("best", state).items()}
        self._good_steps.fill_(self._step)
        self._saved = self._step

    def _learn(self) -> None:
        """One step: the next batch of the epoch's order, varied, and its gradient."""
        recipe, step = self._recipe, self._step
        rows = self._rows_of_step(step)
        chance = stream(recipe.seed, "step", step)
        with torch.random.fork_rng(self._generators):
            # Dropout and its kin draw from the global generator.
            torch.manual_seed(int(torch.randint(2**62, (), generator=chance)))
            pictures = augment(picked(self._pictures, rows, self._device), recipe, chance)
            # Convolutions are faster so, by up to a half; what comes out differs by rounding alone.
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            labels = self._labels[rows].to(self._device)
            with torch.enable_grad():
                with precision_context(recipe.precision, self._device):
                    loss, scalars = self._objective.loss(pictures, labels, step / self.steps, chance)
                self._optimiser.step(loss, step)
        self._step += 1
        # Counted where it is computed, so that a GPU is not waited for.
        finite, good_so_far = loss.detach().isfinite(), self._good_steps == step
        self._good_steps += finite & good_so_far
        self._bad_loss = torch.where(good_so_far, loss.detach().double(), self._bad_loss)
        for name, value in {**scalars, "loss": loss}.items():
            before = self._sums.get(name, torch.zeros((), dtype=torch.float64, device=self._device))
            self._sums[name] = before + value.detach()

    def _rows_of_step(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            chance = stream(self._recipe.seed, "epoch", epoch)
            self._order = epoch, torch.randperm(len(self._labels), generator=chance).tolist()
        size = self._recipe.batch_size
        return self._order[1][place * size : (place + 1) * size]

    def _end_epoch(self) -> None:
        self._refuse_divergence(weights=True)
        means = {name: float(total) / self.steps_per_epoch for name, total in sorted(self._sums.items())}
        self._note("train", {**means, "learning_rate": self._optimiser.rate})
        self._sums = {}
        if self._held_out is None:
            return
        found = evaluate(self._objective, self._held_out, self._recipe, self._device)
        self._note("held_out", found)
        if found["score"] > self._best_score:
            self._best_epoch, self._best_score = self.epoch, found["score"]
            self._best = {name: tensor.detach().clone() for name, tensor in self._module_state().items()}

    def _note(self, split: Split, values: Mapping[str, float]) -> None:
        self._log += [LogRow(self.epoch, self._step, split, name, value) for name, value in values.items()]

    def _refuse_divergence(self, *, weights: bool = False) -> None:
        good = int(self._good_steps)
        if good == self._step and not (weights and not self._weights_are_finite()):
            return
        what, got, at = "loss", float(self._bad_loss), good + 1
        if good == self._step:
            what, got, at = "weight", torch.nan, good
        saved = "none was taken" if self._saved is None else f"the last good one is of step {self._saved}"
        raise UsageError(
            f"training: expected a finite {what}, got {got} in epoch {max(at - 1, 0) // self.steps_per_epoch + 1} "
            f"of {self._recipe.epochs}; lower learning_rate (now {self._recipe.learning_rate}); it came at step "
            f"{at} of {self.steps}, and of the checkpoints {saved}"
        )

    def _weights_are_finite(self) -> bool:
        finite = [one.isfinite().all() for one in self._module_state().values() if one.is_floating_point()]
        return bool(torch.stack(finite).all())

    def _module_state(self) -> dict[str, Tensor]:
        return dict(self._objective.trained.state_dict())

    @property
    def _generators(self) -> list[torch.device]:
        """The devices whose own global generators a step may draw from."""
        return [self._device] if self._device.type == "cuda" else []

    def _describe(self) -> str:
        held_out = 0 if self._held_out is None else len(self._held_out[1])
        shapes = {name: list(one.shape) for name, one in self._module_state().items()}
        facts = {"recipe": asdict(self._recipe), "pictures": len(self._labels), "held_out": held_out}
        return json.dumps({**facts, "objective": type(self._objective).__name__, "module": shapes}, sort_keys=True)
