"""A listener that may fail: its trouble with the Prefect API never stops the run, since truth is in the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.execute import Receipt
from tasks.stage_task import Progress


class Unheeded:
    """Passes on to a listener what it is told; after trouble the listener is spared until the next stage.

    Args:
        listener: who is told.
        trouble: what an error says about the API, or None where it is about something else and is raised.
    """

    def __init__(self, listener: Progress, trouble: Callable[[BaseException], Any]) -> None:
        self._listener = listener
        self._trouble = trouble
        self._spared = False

    def begin(self, stage: str, units: int, images: int) -> None:
        """Passes on."""
        self._spared = False
        self._try(lambda: self._listener.begin(stage, units, images))

    def advance(self, receipt: Receipt) -> None:
        """Passes on."""
        self._try(lambda: self._listener.advance(receipt))

    def wait(self, reason: str) -> None:
        """Passes on."""
        self._try(lambda: self._listener.wait(reason))

    def end(self, stage: str, executed: int, reused: int) -> None:
        """Passes on."""
        self._try(lambda: self._listener.end(stage, executed, reused))

    def _try(self, tell: Callable[[], None]) -> None:
        if self._spared:
            return
        try:
            tell()
        except Exception as error:
            if self._trouble(error) is None:
                raise
            self._spared = True
