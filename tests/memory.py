"""Memory that is really short: the kernel refuses what goes past a limit of the address space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

MIB = 2**20
STATUS = Path("/proc/self/status")
needs_limits = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux: limits are set from /proc/self/status")
# Such tests run before all others (tests/conftest.py): what a process freed stays in its heap, out of the limit.
short_of_memory = pytest.mark.short_of_memory


@contextmanager
def memory_left(count: int) -> Iterator[None]:
    """Inside the block so many bytes can be allocated beyond what the process has, and no more."""
    held = int(STATUS.read_text().split("VmSize:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Meal:
    """Memory that a batch takes: ``each`` bytes a row, where ``fits`` rows have room and one more has not.

    ``asked`` notes the size of every batch that asked, ``refused`` of those that the allocator turned down.
    """

    fits: int
    each: int = 64 * MIB
    asked: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    def take(self, rows: int) -> None:
        """Allocates for a batch and lets go again.

        Raises:
            RuntimeError: what torch's own allocator raises.
        """
        self.asked.append(rows)
        try:
            # Half a row of room is for what else the process allocates meanwhile.
            with memory_left(self.fits * self.each + self.each // 2):
                torch.empty(rows * self.each, dtype=torch.uint8)
        except RuntimeError:
            self.refused.append(rows)
            raise
