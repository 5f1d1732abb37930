"""Vectors that need not fit in memory: read in order, and drawn at random through a shuffle buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xai_core.errors import UsageError

BLOCK_VECTORS = 4096


@dataclass
class Reader:
    """One pass over chunks ``[n, C]``: the vectors that have a direction, in order, as many as asked for.

    What it gives does not depend on how the vectors are cut into chunks. ``position`` counts the vectors given,
    ``zero_vectors`` those of zeros that were left out so far.
    """

    chunks: Iterable[Tensor]
    position: int = 0
    zero_vectors: int = 0

    def __post_init__(self) -> None:
        self._iterator: Iterator[Tensor] = iter(self.chunks)
        self._rest: Tensor | None = None
        self._channels: int | None = None

    def take(self, count: int) -> Tensor | None:
        """The next ``count`` vectors, fewer where the pass ends before, None at its end."""
        pieces: list[Tensor] = []
        while count:
            if self._rest is None and not self._read():
                break
            assert self._rest is not None
            pieces.append(self._rest[:count])
            self._rest = self._rest[count:] if len(self._rest) > count else None
            count -= len(pieces[-1])
            self.position += len(pieces[-1])
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]) if pieces else None

    def _read(self) -> bool:
        """Whether there was a further chunk with a vector in it."""
        for chunk in self._iterator:
            self._refuse_shape(chunk)
            directed = chunk.any(dim=1)
            self.zero_vectors += int((~directed).sum())
            if directed.any():
                vectors = chunk.detach().float()
                self._rest = vectors if directed.all() else vectors[directed]
                return True
        return False

    def _refuse_shape(self, chunk: Tensor) -> None:
        if chunk.ndim != 2:
            raise UsageError(
                f"vectors: expected chunks of shape [n, C], got {tuple(chunk.shape)}; flatten them first"
            )
        if self._channels not in (None, chunk.shape[1]):
            raise UsageError(
                f"vectors: expected {self._channels} channels as in the first chunk, got {chunk.shape[1]}; "
                "stream the vectors of one layer"
            )
        self._channels = chunk.shape[1]


@dataclass(frozen=True)
class Blocks:
    """The vectors of chunks that can be read again and again, in blocks of ``rows``, the last one shorter."""

    chunks: Iterable[Tensor]
    rows: int = BLOCK_VECTORS

    def __iter__(self) -> Iterator[Tensor]:
        reader = Reader(self.chunks)
        while (block := reader.take(self.rows)) is not None:
            yield block


class ShuffleBuffer:
    """Vectors of a stream without end in random order, of which at most ``capacity`` are held.

    Where all vectors fit, they are read once, and every pass over them is a new random order. Otherwise half of
    the buffer is served in random order, then filled up from the stream, again and again, passes without a gap:
    every vector of a pass is served exactly once, mixed with about ``capacity`` neighbours and, ever more rarely,
    farther ones. The order depends on the seed and the vectors, not on the chunks that they come in.

    Args:
        chunks: tensors ``[n, C]``, an iterable that can be read again and again (no generator).
        capacity: vectors held, at least 2.

    Raises:
        UsageError: a generator, a capacity below 2, or no vector besides zeros.
    """

    _reader: Reader
    _held: Tensor
    _resident: bool
    _order: Tensor
    _next: int

    def __init__(self, chunks: Iterable[Tensor], *, capacity: int, seed: int) -> None:
        _refuse_generator(chunks)
        if capacity < 2:
            raise UsageError(f"capacity: expected room for at least 2 vectors, got {capacity}")
        self._chunks, self._capacity = chunks, capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._fill()
        self._shuffle()

    def draw(self, count: int) -> Tensor:
        """The next ``count`` vectors ``[count, C]``, a tensor of their own on the chunks' device."""
        pieces = []
        while count:
            if self._next == self._stop:
                self._refill()
            chosen = self._order[self._next : min(self._stop, self._next + count)]
            pieces.append(self._held.index_select(0, chosen.to(self._held.device)))
            self._next += len(chosen)
            count -= len(chosen)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def state(self) -> dict[str, Tensor]:
        """All that decides what is drawn next; vectors that are all held are read again and not part of it."""
        held = {} if self._resident else {"held": self._held.clone()}
        return {
            **held,
            "order": self._order.clone(),
            "next": torch.tensor(self._next),
            "position": torch.tensor(self._reader.position),
            "generator": self._generator.get_state(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on as the buffer of the same stream, capacity and seed whose ``state`` this was.

        Raises:
            UsageError: the state of another buffer.
        """
        if len(state["order"]) != len(self._held) or ("held" in state) == self._resident:
            raise UsageError(
                f"shuffle buffer: expected the state of one that holds {len(self._held)} vectors, got "
                f"{len(state['order'])}; resume with the same vectors and capacity"
            )
        self._order, self._next = state["order"].clone(), int(state["next"])
        self._generator.set_state(state["generator"])
        if not self._resident:
            self._held = state["held"].to(self._held.device, copy=True)
            self._go_to(int(state["position"]))

    @property
    def _stop(self) -> int:
        """How many of the order are served before the buffer is filled up."""
        return len(self._order) if self._resident else len(self._order) // 2

    def _fill(self) -> None:
        self._reader = Reader(self._chunks)
        held = self._reader.take(self._capacity)
        if held is None:
            raise UsageError(
                "vectors: expected at least one that is not all zero, got none; sample more images, or a layer "
                "whose positions are active"
            )
        self._held = held
        self._resident = len(held) < self._capacity

    def _refill(self) -> None:
        if not self._resident:
            served = self._order[: self._stop].to(self._held.device)
            self._held = self._held.index_copy(0, served, self._read(len(served)))
        self._shuffle()

    def _shuffle(self) -> None:
        self._order = torch.randperm(len(self._held), generator=self._generator)
        self._next = 0

    def _read(self, count: int) -> Tensor:
        """The next vectors of the stream, which begins again after its end."""
        pieces = []
        while count:
            piece = self._reader.take(count)
            if piece is None:
                self._reader = Reader(self._chunks)
                continue
            pieces.append(piece)
            count -= len(piece)
        return torch.cat(pieces)

    def _go_to(self, position: int) -> None:
        self._reader = Reader(self._chunks)
        while missing := position - self._reader.position:
            if self._reader.take(min(missing, BLOCK_VECTORS)) is None:
                raise UsageError(
                    f"vectors: expected at least {position} as when the state was taken, got "
                    f"{self._reader.position}; resume with the same vectors"
                )


def _refuse_generator(chunks: Iterable[Tensor]) -> None:
    if iter(chunks) is chunks:
        raise UsageError(
            f"vectors: expected an iterable that can be read again and again, got a {type(chunks).__name__}; "
            "pass a list of tensors or an object whose __iter__ starts anew"
        )
