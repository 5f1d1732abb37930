"""The autoencoder itself: how it starts, what it computes, and the dictionary that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.dictionary import Dictionary


@dataclass(frozen=True)
class Autoencoder:
    """``a = W_e (x - b_d) + b_e``, codes u from a, ``x' = u W_d + b_d`` (iERF, equation 8), mean |x| = sqrt(C).

    ``W_e`` and ``W_d`` ``[K, C]`` hold a latent in a row; ``b_e`` ``[K]``, ``b_d`` ``[C]``.
    """

    W_e: Tensor
    b_e: Tensor
    W_d: Tensor
    b_d: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All that is learned, by name."""
        return {"W_e": self.W_e, "b_e": self.b_e, "W_d": self.W_d, "b_d": self.b_d}

    @property
    def gradients(self) -> Autoencoder:
        """The gradients of the parameters, tensors of the same shapes that are written into again and again."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return Autoencoder(**{name: parameter.grad for name, parameter in self.parameters.items()})

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Takes from the gradient of every atom what would change its length alone (Bricken et al. 2023)."""
        gradient = self.gradients.W_d
        along = (gradient * self.W_d).sum(dim=1, keepdim=True)
        gradient.addcmul_(along, self.W_d, value=-1)

    @torch.no_grad()
    def normalise(self) -> None:
        """Makes every atom a unit vector again."""
        self.W_d.div_(self.W_d.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(self.W_d.dtype).tiny))


def initial(x: Tensor, centre: Tensor, bias: float, seed: int) -> Autoencoder:
    """An autoencoder that starts at directions of the data ``x [K, C]`` from the centre, its encoder tied.

    Random directions leave more latents dead. Where a vector is the centre, its direction is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    away = x - centre
    directions = F.normalize(torch.where(away.any(dim=1, keepdim=True), away, drawn), dim=1)
    return Autoencoder(
        W_e=directions.clone(),
        b_e=directions.new_full((len(x),), bias),
        W_d=directions.clone(),
        b_d=centre.clone(),
    )


def unscaled(model: Autoencoder, scale: Tensor, selection: Mapping[str, Tensor]) -> Dictionary:
    """The dictionary in the units of the vectors, without sizes: codes and biases are divided by the scale.

    ``selection`` says which latents fire beside the positive ones: the ``threshold`` of activations, or ``top_k``.
    """
    weight = model.W_e.detach().clone()
    units = {name: value / scale if value.is_floating_point() else value for name, value in selection.items()}
    return Dictionary(
        atoms=model.W_d.detach().clone(),
        sizes=torch.zeros(len(weight), dtype=torch.int64, device=weight.device),
        encoder={
            "weight": weight,
            "bias": (model.b_e.detach() - weight @ model.b_d.detach()) / scale,
            "offset": model.b_d.detach() / scale,
            "scale": scale,
            **units,
        },
    )
