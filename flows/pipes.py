"""Output that nobody reads any more, as behind ``| head``."""

from __future__ import annotations

import os
import sys


def silence_output() -> None:
    """Sends what is still printed nowhere: Python flushes again when it ends, and would complain then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
