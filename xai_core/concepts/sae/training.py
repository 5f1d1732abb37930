"""Training of sparse autoencoders: one loop for all variants, streamed, logged, and resumable to the last bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xai_core.concepts.coding import encode
from xai_core.concepts.dictionary import Dictionary, default_atoms
from xai_core.concepts.sae.gradients import Passed
from xai_core.concepts.sae.learner import Learner
from xai_core.concepts.sae.model import Autoencoder, initial, unscaled
from xai_core.concepts.sae.survey import Survey, geometric_median, survey
from xai_core.concepts.sae.variants import VARIANTS
from xai_core.concepts.streams import Blocks, ShuffleBuffer
from xai_core.errors import UsageError, nearest
from xai_core.precision import own_modes
from xai_core.registry import build_options, extractors


@dataclass(frozen=True)
class LogRow:
    """What one step saw of its batch, before it changed the parameters.

    ``vectors`` seen so far, with repetitions; ``rel_l2`` as in iERF's Table III; ``l0``: mean number of latents
    that fire on a vector; ``dead``: share of the latents; ``learning_rate``: Adam's own.
    """

    step: int
    vectors: int
    loss: float
    rel_l2: float
    l0: float
    dead: float
    learning_rate: float


class Training:
    """A sparse autoencoder on its way to a dictionary.

    ``advance`` until ``done``, then take the ``dictionary``. A training that was stopped goes on from its
    ``state`` and ends in the same dictionary and log, bit for bit, on the same machine. Neither depends on how the
    vectors are cut into chunks.

    Args:
        chunks: vectors ``[n, C]`` in an iterable that can be read again and again; memory does not grow with them.
        extractor: ``sae``, ``sae_top_k``, ``sae_batch_top_k`` or ``sae_matryoshka``.
        options: the extractor's options object, or a dict of them; defaults where None.
        atoms: K; by default 8 C, but no more than a quarter of the vectors that are not zero.
        device: where it is computed; the vectors may lie elsewhere.
        state: of the training that this one continues.

    Raises:
        UsageError: vectors that are not ``[n, C]``, not finite or fewer than two besides zeros, more atoms than
            vectors, more active latents than atoms, or the state of another training.
    """

    def __init__(
        self,
        chunks: Iterable[Tensor],
        *,
        extractor: str,
        options: Any = None,
        atoms: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        if extractor not in VARIANTS:
            raise UsageError(f"unknown sparse autoencoder {extractor!r}: {nearest(extractor, VARIANTS)}")
        self._variant, self._extractor, self._seed = VARIANTS[extractor], extractor, seed
        self._options: Any = options
        if not isinstance(options, self._variant.options):
            self._options = build_options(extractors.get(extractor), options or {})
        self._chunks, self._device = chunks, torch.device(device)
        self._identity = json.dumps([extractor, asdict(self._options), atoms, seed], sort_keys=True).encode()
        self._log: list[list[float]] = []
        self._saved: int | None = None
        with own_modes("fp32", self._device):
            if state is None:
                self._begin(survey(chunks, atoms=atoms, seed=seed), atoms)
            else:
                self._resume(state)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._learner.step

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._options.steps

    @property
    def log(self) -> list[LogRow]:
        """One row for every ``log_every`` steps, and for the last one."""
        return [LogRow(int(step), int(vectors), *rest) for step, vectors, *rest in self._log]

    def advance(self, steps: int | None = None) -> None:
        """Trains so many steps further (None: to the end).

        Raises:
            UsageError: the loss is not finite; the message names the step and the last state that was taken.
        """
        last = self._options.steps if steps is None else min(self._options.steps, self.step + steps)
        learner = self._learner
        with own_modes("fp32", self._device):
            while self.step < last:
                x = self._buffer.draw(self._options.batch_size).to(self._device).mul_(self._scale)
                rate, logged = learner.learning_rate, self._is_logged(self.step)
                passed = learner.learn(x)
                if logged:
                    self._refuse_divergence()
                    self._log.append([self.step - 1, self.step * len(x), *self._measure(x, passed), rate])

    def state(self) -> dict[str, Tensor]:
        """All that the rest of the training depends on, as a flat mapping of tensors on the CPU.

        Raises:
            UsageError: the loss is not finite.
        """
        self._refuse_divergence()
        self._saved = self.step
        found = {
            **self._learner.state(),
            **{f"buffer.{name}": value for name, value in self._buffer.state().items()},
            "scale": self._scale,
            "zero_vectors": torch.tensor(self._zero_vectors),
            "log": torch.tensor(self._log, dtype=torch.float64),
            "identity": torch.frombuffer(bytearray(self._identity), dtype=torch.uint8),
        }
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def dictionary(self) -> Dictionary:
        """The dictionary as it is now, in the units of the vectors; one pass over these counts the ``sizes``.

        Raises:
            UsageError: the loss is not finite.
        """
        self._refuse_divergence()
        with own_modes("fp32", self._device):
            found = unscaled(self._learner.model, self._scale, self._selection())
            sizes = sum((encode(found, block.to(self._device)) > 0).sum(dim=0) for block in Blocks(self._chunks))
        return dataclasses.replace(found, sizes=sizes, extractor=self._extractor, zero_vectors=self._zero_vectors)

    def _begin(self, found: Survey, atoms: int | None) -> None:
        count = default_atoms(found.vectors, found.channels) if atoms is None else atoms
        if not 1 <= count <= found.vectors:
            raise UsageError(
                f"atoms: expected 1 to {found.vectors} (the number of non-zero vectors), got {count}; "
                "sample more vectors or ask for fewer atoms"
            )
        self._options.active(count)
        centres = {"mean": lambda: found.mean, "geometric_median": lambda: geometric_median(found.sample)}
        scale = found.channels**0.5 / found.mean_norm
        self._scale, self._zero_vectors = torch.tensor(scale, device=self._device), found.zero_vectors
        model = initial(
            found.sample[:count].to(self._device) * self._scale,
            (centres[self._options.centre]() * scale).float().to(self._device),
            self._variant.bias(self._options, found.channels),
            self._seed,
        )
        self._learner = Learner(self._variant, self._options, model, self._seed)
        self._buffer = self._shuffled()

    def _resume(self, state: Mapping[str, Tensor]) -> None:
        identity = bytes(state["identity"].tolist()) if "identity" in state else b""
        if identity != self._identity:
            raise UsageError(
                f"state: expected one of {self._identity.decode()}, got one of "
                f"{identity.decode(errors='replace') or 'no training'}; resume with the same extractor, options, "
                "atoms and seed, or start anew"
            )
        placed = {name: value.to(self._device, copy=True) for name, value in state.items()}
        self._scale, self._zero_vectors = placed["scale"], int(state["zero_vectors"])
        model = Autoencoder(**{name: placed[name] for name in ("W_e", "b_e", "W_d", "b_d")})
        self._learner = Learner(self._variant, self._options, model, self._seed)
        self._learner.load(placed)
        self._log = state["log"].tolist()
        self._buffer = self._shuffled()
        self._buffer.load(
            {name.removeprefix("buffer."): value for name, value in state.items() if name.startswith("buffer.")}
        )
        self._saved = self.step

    def _shuffled(self) -> ShuffleBuffer:
        return ShuffleBuffer(self._chunks, capacity=self._options.buffer, seed=self._seed)

    def _is_logged(self, step: int) -> bool:
        return step % self._options.log_every == 0 or step == self._options.steps - 1

    def _measure(self, x: Tensor, passed: Passed) -> list[float]:
        """Loss, Rel-l2, l0 and the share of dead latents of a batch; the GPU is waited for once."""
        found: list[float] = torch.stack(
            [
                passed.loss,
                (passed.error.norm(dim=1) / x.norm(dim=1)).mean(),
                (self._learner.codes > 0).sum(dim=1).float().mean(),
                self._learner.dead().float().mean(),
            ]
        ).tolist()
        return found

    def _selection(self) -> dict[str, Tensor]:
        """What says, beside ReLU, which latents fire."""
        choices = {
            "threshold": lambda: self._learner.threshold,
            "top_k": lambda: torch.tensor(self._options.active(len(self._learner.model.W_d)), device=self._device),
        }
        name = self._variant.selects
        return {name: choices[name]()} if name else {}

    def _refuse_divergence(self) -> None:
        if not bool(self._learner.finite):
            saved = "none was taken" if self._saved is None else f"the last good one is of step {self._saved}"
            raise UsageError(
                f"{self._extractor}: expected a finite loss, got NaN or infinity at step "
                f"{int(self._learner.good_steps)} of {self._options.steps}; lower learning_rate (now "
                f"{self._options.learning_rate}); of its checkpoints {saved}"
            )
