"""Timing several functions in turn, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def alternate(functions: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every function in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            seconds = timed(function, device)
            if round_:
                times[name].append(seconds)
    return times


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that one call takes, the GPU's queued work included."""
    _wait(device)
    started = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def row(label: str, **numbers: float | str) -> None:
    """One printed row: a label and named numbers."""
    shown = [f"{key} {_spell(number)}" for key, number in numbers.items()]
    print(f"{label:<44} " + "  ".join(shown), flush=True)


def _spell(number: float | str) -> str:
    return f"{number:.4g}" if isinstance(number, float) else number


__all__ = ["alternate", "median", "row", "timed"]
