"""Sparse autoencoder: concepts are the decoder's rows, codes come from its encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary
from xai_core.errors import UsageError
from xai_core.registry import extractors

_STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class SaeOptions:
    """``l1`` weighs the codes as the LASSO's penalty does, relative to the mean norm of the vectors.

    ``learning_rate`` is relative to 1 / sqrt(C), the size of one coordinate of an atom.
    """

    l1: float = 0.1
    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 0.04

    def __post_init__(self) -> None:
        if self.l1 < 0 or self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise UsageError(
                "sae: expected l1 >= 0, steps >= 1, batch_size >= 1 and learning_rate > 0, got "
                f"{self.l1}, {self.steps}, {self.batch_size} and {self.learning_rate}"
            )


@dataclass
class _Autoencoder:
    """u = ReLU((x - b_d) W_e + b_e) and x' = u W_d + b_d, for x of mean norm sqrt(C)."""

    W_e: Tensor
    b_e: Tensor
    W_d: Tensor
    b_d: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.W_e, self.b_e, self.W_d, self.b_d]

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_d) @ self.W_e + self.b_e)

    def decode(self, u: Tensor) -> Tensor:
        return u @ self.W_d + self.b_d


@extractors.register(
    "sae",
    options=SaeOptions,
    paper="iERF, sections V and VI-A1; Bricken et al. 2023, Towards Monosemanticity",
)
def sae(vectors: Tensor, atoms: int, options: SaeOptions, seed: int) -> Dictionary:
    """Unit-norm decoder rows of a ReLU autoencoder with an L1 penalty (Bricken et al. 2023).

    Trained with Adam on ``1/2 |x - x'|^2 + l1 sqrt(C) |u|_1`` over vectors scaled to a mean norm of sqrt(C),
    the learning rate falling linearly to zero. The encoder is returned for vectors as they are.

    Raises:
        UsageError: the training diverged.
    """
    scale = vectors.shape[1] ** 0.5 / vectors.norm(dim=1).mean()
    generator = torch.Generator().manual_seed(seed)
    penalty = options.l1 * vectors.shape[1] ** 0.5
    model = _initial(vectors * scale, atoms, penalty, generator)
    _train(model, vectors * scale, penalty, options, generator)
    return _unscaled(model, vectors, scale)


def _initial(x: Tensor, atoms: int, penalty: float, generator: torch.Generator) -> _Autoencoder:
    """Starts at directions of the data, coded by one step of ISTA: random ones leave more atoms dead."""
    centre = x.mean(dim=0)
    chosen = torch.randperm(len(x), generator=generator)[:atoms].to(x.device)
    directions = F.normalize(x[chosen] - centre, dim=1)
    return _Autoencoder(
        W_e=directions.T.clone(),
        b_e=directions.new_full((atoms,), -penalty),
        W_d=directions.clone(),
        b_d=centre.clone(),
    )


def _train(
    model: _Autoencoder, x: Tensor, penalty: float, options: SaeOptions, generator: torch.Generator
) -> None:
    for parameter in model.parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters, lr=options.learning_rate / x.shape[1] ** 0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / options.steps)
    for step in range(options.steps):
        batch = x[torch.randint(len(x), (options.batch_size,), generator=generator).to(x.device)]
        with torch.enable_grad():
            loss = _loss(model, batch, penalty)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.W_d.copy_(F.normalize(model.W_d, dim=1))
        if step % _STEPS_BETWEEN_CHECKS == 0 or step == options.steps - 1:
            _refuse_divergence(loss, step, options)
    for parameter in model.parameters:
        parameter.requires_grad_(False)


def _loss(model: _Autoencoder, x: Tensor, penalty: float) -> Tensor:
    u = model.encode(x)
    error = x - model.decode(u)
    return (error.square().sum(dim=1) / 2 + penalty * u.sum(dim=1)).mean()


def _refuse_divergence(loss: Tensor, step: int, options: SaeOptions) -> None:
    if not loss.isfinite():
        raise UsageError(
            f"sae: expected a finite loss, got {loss.item()} at step {step} of {options.steps}; "
            f"lower learning_rate (now {options.learning_rate})"
        )


def _unscaled(model: _Autoencoder, vectors: Tensor, scale: Tensor) -> Dictionary:
    """The dictionary in the units of the vectors: ReLU commutes with the scale, so the encoder absorbs it."""
    weight = model.W_e.T.contiguous()
    bias = (model.b_e - weight @ model.b_d) / scale
    codes = torch.relu(vectors @ weight.T + bias)
    return Dictionary(
        atoms=model.W_d,
        sizes=(codes > 0).sum(dim=0),
        encoder={"weight": weight, "bias": bias, "offset": model.b_d / scale, "scale": scale},
    )
