"""Attributors of one backward pass a scalar: plain gradients, and the rules of SRD and of AttnLRP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xai_core.arithmetic import wide
from xai_core.attribution.gradients.gradient import CHANNELS, Channels, check_channels
from xai_core.attribution.propagation.attn_lrp import AttnLrpOptions, attention_with_rules, attn_lrp_rules
from xai_core.attribution.propagation.sharing_ratio import sharing_ratio_rules, start_at
from xai_core.attribution.propagation.srd import affine_between_activations
from xai_core.attribution.propagation.structure import zennit_installed
from xai_core.concepts.vectors import from_vectors
from xai_core.errors import UsageError
from xai_core.layers import captured
from xai_core.receptive_fields.attributors import attributors
from xai_core.receptive_fields.passes import Reading, output_of
from xai_core.registry import NoOptions

# From a layer's vectors [n, P, C], the gradient of scalars [n] at them, and these: what to start with instead.
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
Rules = Callable[[nn.Module], AbstractContextManager[None]]

PATCHES = "patch_embed"


@dataclass(frozen=True)
class Recorded:
    """The graph of a pass from where it begins to the layer where it ends."""

    begin: Tensor
    output: Tensor
    reading: Reading

    def settled(self) -> Recorded:
        """The same, its scalars settled on this pass, which is one of clean images."""
        return Recorded(self.begin, self.output, self.reading.settled(self.output))

    def gradients(self, start: Start | None = None) -> Iterator[Tensor]:
        """Gradients of each column's scalars with respect to where the pass began, ``[n, ...]``."""
        columns = self.reading.all_columns()
        for number, which in enumerate(columns):
            gradient = _at_layer(self.reading, self.output.detach(), which, start)
            more = number < len(columns) - 1
            (found,) = torch.autograd.grad(
                self.output, self.begin, gradient, retain_graph=more, materialize_grads=True, allow_unused=True
            )
            yield found[: len(which)]


def recorded_from_pixels(reading: Reading, images: Tensor, rules: Rules = lambda _: nullcontext()) -> Recorded:
    """One pass of images ``[R, 3, H, W]``, a row of the reading each, down to the layer."""
    pixels = images.detach().requires_grad_(True)
    with torch.enable_grad(), rules(reading.model.module):
        return Recorded(pixels, output_of(reading.model, pixels, reading.scalars.layer), reading)


def _at_layer(reading: Reading, output: Tensor, which: Tensor, start: Start | None) -> Tensor:
    """The gradient of the scalars ``which`` at the layer, in its own layout; zeros in rows that have none."""
    with torch.enable_grad():
        leaf = output.requires_grad_(True)
        vectors = reading.vectors(leaf)[: len(which)]
        values = reading.scalars(vectors, which)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, materialize_grads=True, allow_unused=True)
    if start is None:
        return gradient
    of_vectors = reading.vectors(gradient)
    started = torch.zeros_like(of_vectors)
    started[: len(which)] = start(vectors.detach(), of_vectors[: len(which)], values.detach())
    return from_vectors(reading.model, started, like=gradient)


@dataclass(frozen=True)
class FieldGradientOptions:
    """``channels``: a pixel is the sum of its channels' magnitudes, the largest magnitude, or the signed sum."""

    channels: Channels = "sum_abs"

    def __post_init__(self) -> None:
        check_channels("gradient", self.channels)


@attributors.register(
    "gradient",
    options=FieldGradientOptions,
    paper="Simonyan et al. 2014, Deep Inside Convolutional Networks",
    equation="section 3.1",
    cost="1 gradient up to the layer",
)
def gradient(reading: Reading, options: FieldGradientOptions, batch_size: int) -> Iterator[Tensor]:
    """Gradient of the scalar at the pixels, its absolute value summed over the colour channels."""
    recorded = recorded_from_pixels(reading, reading.images).settled()
    yield from map(CHANNELS[options.channels], recorded.gradients())


@attributors.register(
    "srd",
    paper="iERF: Kim et al., sharing ratio decomposition",
    equation="2, 3, 17-21",
    families=("cnn",),
    needs=(affine_between_activations,),
    cost="about 1.5 to 2 gradients up to the layer",
)
def srd(reading: Reading, options: NoOptions, batch_size: int) -> Iterator[Tensor]:
    """SRD: the scalar's relevance, shared among feature vectors down to the pixels, where it adds up to it."""
    recorded = recorded_from_pixels(reading, reading.images, sharing_ratio_rules).settled()
    pixels = wide(reading.images)
    for shared in recorded.gradients(with_bias_shared):
        yield (pixels[: len(shared)] * shared).sum(dim=1)


def with_bias_shared(vectors: Tensor, gradient: Tensor, values: Tensor) -> Tensor:
    """A scalar as one more affine layer of sharing ratios: the gradient with which its backward pass starts.

    A vector's part in the scalar is its inner product with the gradient, as in equation 17. What these parts leave
    of the scalar, a bias of an encoder, is shared equally by the vectors that the scalar reads.

    Args:
        vectors, gradient: ``[n, P, C]``; values: the scalars ``[n]``.
    """
    vectors, gradient = wide(vectors), wide(gradient)
    left = values - (vectors * gradient).sum(dim=(1, 2))
    read = (gradient.any(dim=2) & vectors.any(dim=2)).to(left.dtype)
    share = read * (left / read.sum(dim=1).clamp(min=1)).unsqueeze(1)
    return gradient + start_at(vectors, share, dim=-1)


@dataclass(frozen=True)
class FieldAttnLrpOptions:
    """``gamma_linear``: as in the method ``attn_lrp``. ``channels``: a patch is the ``norm`` of its channels'
    relevance (iERF, section III-D), or their signed ``sum`` (VII-I), which tells what speaks against the scalar.
    """

    gamma_linear: float = 0.05
    channels: Literal["norm", "sum"] = "norm"

    def __post_init__(self) -> None:
        self.rules()
        if self.channels not in PATCH_CHANNELS:
            raise UsageError(f"attn_lrp.channels: expected {' or '.join(PATCH_CHANNELS)}, got {self.channels!r}")

    def rules(self) -> Rules:
        """The method's rules; the convolution that embeds the patches is left out of the pass."""
        return partial(attn_lrp_rules, options=AttnLrpOptions(gamma_linear=self.gamma_linear))


PATCH_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda relevance: relevance.norm(dim=-1),
    "sum": lambda relevance: relevance.sum(dim=-1),
}


def patches_embedded(model: Any, _options: Any) -> str | None:
    """A layer ``patch_embed``, whose output is the patches' embeddings."""
    return None if hasattr(model.module, PATCHES) else f"it has no layer {PATCHES!r}"


@attributors.register(
    "attn_lrp",
    options=FieldAttnLrpOptions,
    paper="iERF: Kim et al., section III-D; Achtibat et al. 2024, AttnLRP",
    equation="III-D; AttnLRP propositions 3.1, 3.3, 3.4",
    needs=(zennit_installed, patches_embedded, attention_with_rules),
    resolution="patches",
    cost="about 5 gradients from the patch embeddings to the layer (1 with gamma_linear 0)",
)
def attn_lrp(reading: Reading, options: FieldAttnLrpOptions, batch_size: int) -> Iterator[Tensor]:
    """AttnLRP: relevance of the patch embeddings for the scalar, its l2 norm over the channels."""
    model, layer = reading.model, reading.scalars.layer
    embedded = captured(model, [PATCHES], with_gradient=True)
    with torch.enable_grad(), options.rules()(model.module), embedded as kept:
        output = output_of(model, reading.images, layer)
    if PATCHES not in kept:
        raise UsageError(f"layer {layer!r}: expected one behind the patch embedding, got one in it")
    recorded = Recorded(kept[PATCHES], output, reading).settled()
    patches = wide(recorded.begin.detach())
    read = PATCH_CHANNELS[options.channels]
    for relevance in recorded.gradients():
        yield read(patches[: len(relevance)] * relevance).reshape(len(relevance), *grid_of(reading, patches))


def grid_of(reading: Reading, patches: Tensor) -> tuple[int, int]:
    """Rows and columns of the patch embeddings ``[R, N, C]`` or ``[R, h, w, C]``."""
    if patches.ndim == 4:
        return patches.shape[1], patches.shape[2]
    return reading.model.token_grid
