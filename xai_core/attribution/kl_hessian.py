"""KL-Hessian: belief shift of a part, amplified by curvature (Maliha & Hougen, Beyond Gradients, eq. 1-11).

For every part k of an image the method takes a step of length epsilon along a direction inside the part,
built from the gradient and from the Hessian's action on it, and measures by how much the whole
distribution over classes moves. All parts of all images run as one flat list of (image, part) pairs, cut
into passes of the caller's batch size: 2K + 1 input gradients and 2K forwards an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xai_core.attention import explicit_attention
from xai_core.attribution.gradients.gradient import input_gradient
from xai_core.attribution.interface import PartScores
from xai_core.batching import run_batches
from xai_core.errors import UsageError
from xai_core.models import Classifier
from xai_core.parts.labels import parts_present
from xai_core.registry import methods

# The paper writes one epsilon for the probe's length (eq. 6) and for the guard of the divisions (eq. 1, 3,
# 4). A guard of 0.2 would shorten every direction with a small gradient, so the guard is its own number.
GUARD = 1e-12


@dataclass(frozen=True)
class KlHessianOptions:
    """Options of KL-Hessian, named as in the paper.

    ``epsilon``: probe length (eq. 6); ``delta``: finite-difference step (eq. 5); ``blend``: lambda, the
    weight of the second-order direction (eq. 4); ``gamma``: weight of the curvature (eq. 10), all in the
    normalised input space. ``hessian``: how Hv is computed. ``score``: the full product (eq. 11) or the
    two ablations of section 7.
    """

    epsilon: float = 0.20
    delta: float = 0.06
    blend: float = 0.40
    gamma: float = 1.0
    hessian: Literal["finite_difference", "exact"] = "finite_difference"
    score: Literal["full", "kl_only", "hessian_only"] = "full"

    def __post_init__(self) -> None:
        for name, least in (("epsilon", 0), ("delta", 0), ("blend", -1e-300), ("gamma", -1e-300)):
            value = getattr(self, name)
            if not value > least:
                raise UsageError(
                    f"kl_hessian.{name}: expected a number {'> 0' if least == 0 else '>= 0'}, got {value}"
                )


@dataclass(frozen=True)
class _Pairs:
    """A flat batch of (image, part) pairs: inputs ``[n, 3, H, W]``, masks ``[n, 1, H, W]``."""

    images: Tensor
    targets: Tensor
    masks: Tensor
    directions: Tensor  # v_k of equation 1


HessianProduct = Callable[[Classifier, _Pairs, float], Tensor]


def finite_difference_hvp(model: Classifier, pairs: _Pairs, delta: float) -> Tensor:
    """Symmetric finite difference of gradients along v (eq. 5): ``[n, 3, H, W]``, two gradients a pair."""
    step = delta * pairs.directions
    both = torch.cat([pairs.images + step, pairs.images - step])
    _, gradients = input_gradient(model, both, pairs.targets.repeat(2))
    forward, backward = gradients.chunk(2)
    return (forward - backward).div_(2 * delta)


def exact_hvp(model: Classifier, pairs: _Pairs, _delta: float) -> Tensor:
    """Hessian-vector product by differentiating the gradient (eq. 2): ``[n, 3, H, W]``."""
    with torch.enable_grad(), explicit_attention(model.module):
        leaves = pairs.images.detach().requires_grad_(True)
        score = model(leaves).gather(1, pairs.targets.view(-1, 1)).sum()
        (gradient,) = torch.autograd.grad(score, leaves, create_graph=True)
        (product,) = torch.autograd.grad((gradient * pairs.directions).sum(), leaves)
    return product


HESSIAN_PRODUCTS: dict[str, HessianProduct] = {
    "finite_difference": finite_difference_hvp,
    "exact": exact_hvp,
}

SCORES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "full": lambda kl_sym, curvature, gamma: kl_sym * (1 + gamma * curvature.clamp(min=0)),
    "kl_only": lambda kl_sym, curvature, gamma: kl_sym,
    "hessian_only": lambda kl_sym, curvature, gamma: _share(curvature.clamp(min=0)),
}


@methods.register(
    "kl_hessian",
    options=KlHessianOptions,
    paper="Maliha & Hougen, Beyond Gradients: Curvature-Aware Part-Level Explanations for Vision Models",
    equation="1-11",
    output="parts",
    cost="(2K + 1) input gradients + 2K forwards",
)
def kl_hessian(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    options: KlHessianOptions,
    batch_size: int,
) -> PartScores:
    """KL-Hessian part scores S(k) = KL_sym(k) (1 + gamma max(curv(k), 0)).

    Args:
        parts: labels ``[B, H, W]`` in 0..K-1, 255 where a pixel belongs to no part.
        batch_size: the most pictures in one pass, fewer where these do not fit in memory; a pair is two pictures.

    Returns:
        Scores ``[B, K]`` with terms ``kl_sym`` (nats) and ``curvature`` (logit per squared input unit).
    """
    if parts.shape != images.shape[:1] + images.shape[-2:]:
        raise UsageError(
            f"kl_hessian: expected part labels {(len(images), *images.shape[-2:])}, got {tuple(parts.shape)}"
        )
    parts = parts.to(images.device).long()
    present = parts_present(parts)
    image_of, part_of = present.nonzero(as_tuple=True)
    gradients, log_probs = _clean_pass(model, images, targets, batch_size)
    terms = run_batches(
        lambda rows: _pair_terms(
            model, images, targets, parts, gradients, log_probs, image_of[rows], part_of[rows], options
        ),
        len(image_of),
        max(1, batch_size // 2),
    )
    kl_sym = _scatter(present, [kl for kl, _ in terms])
    curvature = _scatter(present, [curv for _, curv in terms])
    score = SCORES[options.score](kl_sym, curvature, options.gamma)
    return PartScores(score, {"kl_sym": kl_sym, "curvature": curvature})


def _clean_pass(model: Classifier, images: Tensor, targets: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The gradient g of every image, once, and the log-probabilities of the clean image from the same pass."""
    passes = run_batches(lambda rows: input_gradient(model, images[rows], targets[rows]), len(images), batch_size)
    logits = torch.cat([logits for logits, _ in passes])
    return torch.cat([gradient for _, gradient in passes]), logits.double().log_softmax(dim=1)


def _pair_terms(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    parts: Tensor,
    gradients: Tensor,
    log_probs: Tensor,
    owner: Tensor,
    part: Tensor,
    options: KlHessianOptions,
) -> tuple[Tensor, Tensor]:
    """KL_sym (eq. 8) and curvature (eq. 9) of a flat batch of pairs."""
    masks = (parts[owner] == part.view(-1, 1, 1)).unsqueeze(1)
    direction = _unit(gradients[owner] * masks)
    pairs = _Pairs(images[owner], targets[owner], masks, direction)
    product = HESSIAN_PRODUCTS[options.hessian](model, pairs, options.delta)
    curvature = (direction * product).flatten(1).sum(dim=1, dtype=torch.float64)
    probe = _unit(direction.add(_unit(product.mul_(masks)), alpha=options.blend))
    return _belief_shift(model, pairs.images, probe.mul_(options.epsilon), log_probs[owner]), curvature


def _belief_shift(model: Classifier, images: Tensor, step: Tensor, clean: Tensor) -> Tensor:
    """KL_sym of equation 8 for a step and its opposite; ``clean`` are log-probabilities."""
    with torch.no_grad():
        logits = model(torch.cat([images + step, images - step]))
    ahead, behind = logits.double().log_softmax(dim=1).chunk(2)
    return 0.5 * (symmetric_kl(clean, ahead) + symmetric_kl(clean, behind))


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """SKL(p, q) of equation 7 from log-probabilities ``[n, C]``, in nats: ``[n]``."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length one, pixel and channel axes taken together; a zero vector stays zero."""
    norms = torch.linalg.vector_norm(vectors.flatten(1), dim=1).view(-1, 1, 1, 1)
    return vectors / (norms + GUARD)


def _scatter(present: Tensor, values: list[Tensor]) -> Tensor:
    """Values of the flat pairs back into ``[B, K]``; NaN where a part does not occur."""
    table = torch.full(present.shape, torch.nan, dtype=torch.float64, device=present.device)
    if values:
        table[present] = torch.cat(values)
    return table


def _share(curvature: Tensor) -> Tensor:
    """Curvature as a share of the image's largest (section 7: normalised per image); zero stays zero."""
    largest = curvature.nan_to_num(0).amax(dim=1, keepdim=True)
    return curvature / torch.where(largest > 0, largest, torch.ones_like(largest))
