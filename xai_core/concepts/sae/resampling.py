"""Dead latents that begin anew, as Bricken et al. 2023 (Towards Monosemanticity, "Neuron Resampling") do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.concepts.sae.model import Autoencoder

# So long are the encoders of resampled latents, relative to the mean of the living.
_ENCODER_LENGTH = 0.2


@torch.no_grad()
def resample(
    model: Autoencoder,
    optimiser: torch.optim.Adam,
    dead: Tensor,
    x: Tensor,
    error: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Points dead latents at vectors of a batch, drawn without replacement by their squared error.

    The paper draws from many batches; here one has to do, so that at most B latents begin anew at a time.

    Args:
        dead: indices of latents ``[D]``; x: vectors ``[B, C]``; error: what is missed of them ``[B, C]``.

    Returns:
        The latents that began anew; none where no latent lives, of which the lengths are taken.
    """
    dead = dead[: len(x)]
    living = torch.ones(len(model.W_d), dtype=torch.bool, device=x.device).index_fill_(0, dead, False)
    if not len(dead) or not living.any():
        return dead[:0]
    weights = error.square().sum(dim=1).cpu().clamp_min(torch.finfo(torch.float32).tiny)
    drawn = torch.multinomial(weights, len(dead), generator=generator).to(x.device)
    directions = F.normalize(x[drawn] - model.b_d, dim=1)
    begun = {
        model.W_d: directions,
        model.W_e: directions * (_ENCODER_LENGTH * model.W_e[living].norm(dim=1).mean()),
        model.b_e: torch.zeros(len(dead), device=x.device),
    }
    for parameter, value in begun.items():
        parameter.index_copy_(0, dead, value)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimiser.state[parameter][moment].index_fill_(0, dead, 0.0)
    return dead
