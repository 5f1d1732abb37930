"""How feature vectors share the relevance that comes to them: start vectors, and what a bias takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from xai_core.arithmetic import ratio, wide


def start_at(vectors: Tensor, relevance: Tensor, dim: int = 1) -> Tensor:
    """The gradient with which feature vectors (channels along ``dim``) of some relevance start a backward pass.

    Args:
        vectors: ``[..., C, ...]``; relevance: the same without ``dim``. A zero vector starts nothing.
    """
    vectors = wide(vectors)
    return vectors * over(relevance.unsqueeze(dim), vectors.square().sum(dim, keepdim=True))


def over(relevance: Tensor, squares: Tensor) -> Tensor:
    """Relevance over the squared length of the vectors that take it; 0 where these have none to speak of."""
    numbers = torch.finfo(squares.dtype)
    # So short that the quotient could be infinite.
    return ratio(relevance, squares.masked_fill(squares < numbers.tiny / numbers.eps, 0.0))


class Squares:
    """Squared lengths of the vectors of one tensor, the same in every backward pass of a graph."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._known: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Of ``x`` in float32 at least, with a length of 1 along ``dim``."""
        # Gradients are on in a backward pass that is itself to be differentiated.
        if self._known is None or torch.is_grad_enabled():
            self._known = x.square().sum(self.dim, keepdim=True)
        return self._known


class Bias:
    """The bias of one call of a layer: what relevance it takes, and how the layer's inputs share it."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        self._layer = layer
        self._squares = Squares(dim)
        # Where inputs are not zero, and how many of these each output sees: [B, 1, h, w] and [B, 1, h', w'].
        self._live: Tensor | None = None
        self._counts: Tensor | None = None
        #: Relevance of the shift of the norm behind the layer, ``[B, h, w]``: its backward has run by then.
        self.of_norm: Tensor | None = None

    def shares(self, source: Tensor, gradient: Tensor) -> Tensor | None:
        """What the bias adds to the gradient of the layer's inputs; None where nothing is added."""
        dim = self._squares.dim
        relevance, self.of_norm = self.of_norm, None
        own = self._layer.bias
        if own is not None:
            taken = inner(gradient, own, dim)
            relevance = taken if relevance is None else relevance + taken
        if relevance is None:
            return None
        source = wide(source)
        squares = self._squares.of(source)
        relevance = relevance.unsqueeze(dim)
        return source * over(relevance if dim == -1 else self._spread(relevance, squares > 0), squares)

    def _spread(self, relevance: Tensor, live: Tensor) -> Tensor:
        """Relevance ``[B, 1, h', w']`` of outputs, in equal shares to the live inputs that they see."""
        if self._live is None or self._counts is None:
            with torch.enable_grad():
                self._live = live.to(relevance.dtype).requires_grad_(True)
                self._counts = _box_of(self._layer, relevance).forward(self._live)
        each = ratio(relevance, self._counts.detach())
        (spread,) = torch.autograd.grad(
            self._counts, self._live, each, retain_graph=True, create_graph=torch.is_grad_enabled()
        )
        return spread * self._live.detach()


def _box_of(layer: nn.Module, like: Tensor) -> Any:
    """A convolution of the same geometry that adds up one channel."""
    box: Any = copy.copy(layer)
    box._parameters = {"weight": like.new_ones(1, 1, *box.kernel_size), "bias": None}
    box.groups = 1
    return box


def inner(gradient: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Inner products of a gradient with a vector ``[C]`` that is the same everywhere, without ``dim``."""
    shift = shift.to(gradient.dtype)
    if dim == -1:
        return gradient @ shift
    # Its sum by a matrix product needs no copy of the gradient.
    rows = shift.expand(len(gradient), 1, -1)
    return torch.bmm(rows, gradient.flatten(2)).view(len(gradient), *gradient.shape[2:])
