"""The shuffle buffer: what it serves, in which order, and that it goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from xai_core.concepts.streams import Blocks, Reader, ShuffleBuffer
from xai_core.errors import UsageError


def numbered(count: int, start: int = 1) -> Tensor:
    """Vectors that say which they are."""
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1).expand(-1, 2)


def cut(vectors: Tensor, *sizes: int) -> list[Tensor]:
    return list(vectors.split([*sizes, len(vectors) - sum(sizes)]))


def served(buffer: ShuffleBuffer, *counts: int) -> list[int]:
    return [int(number) for count in counts for number in buffer.draw(count)[:, 0]]


@pytest.mark.parametrize("sizes", [(), (1, 2, 4), (0, 10, 3), (5, 5, 5)])
def test_a_reader_gives_vectors_in_order_without_zeros_whatever_the_chunks(sizes: tuple[int, ...]) -> None:
    vectors = numbered(20).clone()
    vectors[[0, 7, 19]] = 0
    reader = Reader(cut(vectors, *sizes))
    taken = [reader.take(6), reader.take(100)]
    assert reader.take(1) is None
    assert (reader.position, reader.zero_vectors) == (17, 3)
    assert torch.equal(torch.cat(taken), vectors[vectors.any(dim=1)])  # type: ignore[arg-type]
    assert [len(block) for block in Blocks(cut(vectors, *sizes), 8)] == [8, 8, 1]


def test_what_fits_is_served_once_a_pass_in_new_orders() -> None:
    buffer = ShuffleBuffer(cut(numbered(10), 3), capacity=11, seed=0)
    passes = [served(buffer, 10) for _ in range(3)]
    assert all(sorted(one) == list(range(1, 11)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(1, 11))


def test_what_does_not_fit_is_served_once_a_pass_and_mixed_over_the_capacity() -> None:
    total, capacity = 1000, 100
    buffer = ShuffleBuffer([numbered(total)], capacity=capacity, seed=0)
    first = served(buffer, *([30] * 90))
    times = torch.bincount(torch.tensor(first), minlength=total + 1)[1:]
    # The stream is ahead of what was served by what is held.
    assert int(times.sum()) == 2700
    assert times.min() >= 2
    assert times.max() <= 3
    # Nothing is served before it was read, and neighbours are torn apart.
    assert all(number <= place + capacity for place, number in enumerate(first[:900], start=1))
    steps = torch.tensor(first[:900]).diff().abs().float()
    assert steps.median() > capacity / 8
    assert (steps > capacity).any()


@pytest.mark.parametrize("capacity", [7, 12, 64])
def test_order_depends_on_the_seed_and_not_on_chunks_or_batches(capacity: int) -> None:
    whole = served(ShuffleBuffer([numbered(33)], capacity=capacity, seed=1), 5, 40, 17)
    pieces = served(ShuffleBuffer(cut(numbered(33), 1, 20, 5), capacity=capacity, seed=1), *([1] * 62))
    assert whole == pieces
    assert whole != served(ShuffleBuffer([numbered(33)], capacity=capacity, seed=2), 62)


@pytest.mark.parametrize("capacity", [7, 12, 64])
@pytest.mark.parametrize("before", [1, 6, 35, 80])
def test_a_buffer_goes_on_where_another_was_stopped(capacity: int, before: int) -> None:
    one = ShuffleBuffer([numbered(33)], capacity=capacity, seed=1)
    served(one, before)
    state = one.state()
    expected = served(one, 70)
    other = ShuffleBuffer(cut(numbered(33), 4, 4), capacity=capacity, seed=1)
    other.load(state)
    assert served(other, 70) == expected


def test_no_more_than_the_capacity_is_held_and_read_ahead() -> None:
    read = []

    class Counted:
        def __iter__(self) -> Iterator[Tensor]:
            for start in range(0, 10_000, 10):
                read.append(start)
                yield numbered(10, start + 1)

    buffer = ShuffleBuffer(Counted(), capacity=40, seed=0)
    served(buffer, 100)
    assert len(read) <= 15
    assert buffer.state()["held"].shape == (40, 2)
    assert "held" not in ShuffleBuffer([numbered(9)], capacity=40, seed=0).state()


def test_a_state_of_another_buffer_is_refused() -> None:
    small, large = (ShuffleBuffer([numbered(count)], capacity=12, seed=0) for count in (8, 30))
    with pytest.raises(UsageError, match=r"holds 8 vectors, got 12"):
        small.load(large.state())
    served(large, 17)
    shorter = ShuffleBuffer([numbered(20)], capacity=12, seed=0)
    with pytest.raises(UsageError, match=r"expected at least \d+ as when the state was taken, got 20"):
        shorter.load(large.state())


@pytest.mark.parametrize(
    ("chunks", "capacity", "complaint"),
    [
        (iter([numbered(3)]), 5, "read again and again, got a list_iterator"),
        ([numbered(3)], 1, "at least 2 vectors, got 1"),
        ([torch.zeros(4, 2)], 5, "not all zero, got none"),
        ([torch.ones(4)], 5, r"\[n, C\], got \(4,\)"),
    ],
)
def test_a_buffer_refuses(chunks: list[Tensor], capacity: int, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ShuffleBuffer(chunks, capacity=capacity, seed=0)
