"""Batches that do not fit in memory are halved, down to a single row, before they are given up."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xai_core.errors import ImageError, OutOfMemory

T = TypeVar("T")

# What allocators say that raise neither torch.OutOfMemoryError nor MemoryError: torch's on the CPU, oneDNN's
# (whose whole message the last two are), CUDA's and its libraries'.
PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
MESSAGES = ("could not create a primitive", "could not create a memory object")


@dataclass
class Batches(Generic[T]):
    """What became of a list of rows: results of consecutive stretches of them, and the rows that failed.

    ``rows`` are the positions that the results are about, in their order; ``failed`` gives the error of each
    other one.
    """

    results: list[T] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    failed: dict[int, ImageError] = field(default_factory=dict)


def run_batches(function: Callable[[slice], T], count: int, batch_size: int) -> list[T]:
    """Results of ``function`` over the rows 0 .. ``count`` - 1, in slices of at most ``batch_size``, in order.

    A slice that does not fit in memory is halved, recursively; the others stay as they are.

    Raises:
        ImageError: a single row cannot be treated; nothing after it is tried.
    """
    results = []
    for _, result in _pieces(function, count, batch_size):
        if isinstance(result, ImageError):
            raise _fresh(result)
        results.append(result)
    return results


def try_batches(function: Callable[[slice], T], count: int, batch_size: int) -> Batches[T]:
    """As :func:`run_batches`, but a single row that cannot be treated is noted and the others are treated."""
    found: Batches[T] = Batches()
    for rows, result in _pieces(function, count, batch_size):
        if isinstance(result, ImageError):
            found.failed[rows.start] = result
        else:
            found.results.append(result)
            found.rows += range(rows.start, rows.stop)
    return found


def run_smaller(function: Callable[[int], T], size: int, least: int = 1) -> T:
    """``function`` of the largest ``size`` that fits in memory: halved, down to ``least``, while it does not.

    For a loop of somebody else's that takes the size of its passes as a number.

    Raises:
        ImageError: it does not fit with passes of ``least`` either.
    """
    while True:
        result = _attempt(function, size)
        if not isinstance(result, ImageError):
            return result
        if size <= least:
            raise _fresh(result)
        size = max(least, size // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on the GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (text in MESSAGES or any(phrase in text for phrase in PHRASES))


def join_rows(tables: Sequence[Tensor]) -> Tensor:
    """Tables ``[b_i, K_i]`` one below the other, ``[sum b_i, max K_i]``; narrower ones are filled up with NaN."""
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1]), value=torch.nan) for table in tables])


def _pieces(function: Callable[[slice], T], count: int, batch_size: int) -> Iterator[tuple[slice, T | ImageError]]:
    for first in range(0, count, batch_size):
        yield from _halved(function, slice(first, min(first + batch_size, count)))


def _halved(function: Callable[[slice], T], rows: slice) -> Iterator[tuple[slice, T | ImageError]]:
    alone = rows.stop - rows.start == 1
    result = _last_attempt(function, rows) if alone else _attempt(function, rows)
    if alone or not isinstance(result, ImageError):
        yield rows, result
        return
    if isinstance(result, OutOfMemory):
        _tell_once()
    middle = (rows.start + rows.stop + 1) // 2
    yield from _halved(function, slice(rows.start, middle))
    yield from _halved(function, slice(middle, rows.stop))


def _last_attempt(function: Callable[[slice], T], rows: slice) -> T | ImageError:
    """Collecting garbage takes longer than many a pass, so it is left for when there is nothing to halve."""
    result = _attempt(function, rows)
    if isinstance(result, OutOfMemory) and gc.collect():
        return _attempt(function, rows)
    return result


def _attempt(function: Callable[..., T], argument: slice | int) -> T | ImageError:
    """The result, or why some image cannot be treated so; any other error goes on its way."""
    failure: ImageError
    try:
        return function(argument)
    except ImageError as error:
        failure = _fresh(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = OutOfMemory(f"does not fit in memory even alone: {_first_line(error)}")
    # Only out here is the failed attempt's traceback gone, and with it the tensors that its frames held.
    if isinstance(failure, OutOfMemory) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return failure


def _fresh(error: ImageError) -> ImageError:
    """The same error without its past: a traceback whose frames hold the error would keep their tensors alive."""
    return type(error)(*error.args)


@cache
def _tell_once() -> None:
    logging.getLogger(__name__).warning(
        "a batch did not fit in memory and was halved; a smaller batch size saves later ones the detour"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
