"""What a query may take: time, memory, threads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from storage.errors import QueryError

LONGEST_SECONDS = 1e7

UNITS = {
    unit + suffix: factor**power
    for power, unit in enumerate(("k", "m", "g", "t"), start=1)
    for suffix, factor in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True)
class Limits:
    """The limits of a query: ``timeout`` in seconds, ``memory_limit`` as a size such as 512MB or 2GiB, threads.

    Raises:
        QueryError: a time that is not above 0, a text that is no size, or fewer than one thread.
    """

    timeout: float = 60.0
    memory_limit: str = "1GB"
    threads: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST_SECONDS:
            raise QueryError(f"--timeout: expected seconds above 0, got {self.timeout:g}")
        if self.threads < 1:
            raise QueryError(f"--threads: expected at least 1, got {self.threads}")
        if self.memory_bytes < 1:
            raise QueryError(f"--memory: expected a size such as 512MB or 2GiB, got {self.memory_limit!r}")

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes; 0 where its text is no size."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", self.memory_limit, re.IGNORECASE)
        return int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
