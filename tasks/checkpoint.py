"""Checkpoints of a training that may be killed: no truth is in them, and no record vouches for one."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from storage.commits import KEY_CHARACTERS
from storage.files import publish_bytes, remove_leftovers
from storage.store import Store

# At most this share of the time goes into checkpoints.
SHARE = 0.05
_DIGEST_BYTES = hashlib.sha256().digest_size


class Checkpoint:
    """The last state of one unit's training: a file in the store's folder ``work``, named by the unit's key.

    One that is missing, damaged or cannot be written makes a training begin anew, and nothing else.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.path = store.root.resolve() / "work" / f"{key[:KEY_CHARACTERS]}.checkpoint"
        self._due = 0.0

    def read(self) -> dict[str, Tensor] | None:
        """The state that was written last, or None where there is none that is whole."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return load(body) if hashlib.sha256(body).digest() == digest else None

    @property
    def due(self) -> bool:
        """Whether so much time has passed since the last one that another costs little."""
        return time.monotonic() >= self._due

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Puts a state in place, whole or not at all; a folder that cannot be written to is said, not fatal."""
        started = time.monotonic()
        body = save(dict(state))
        try:
            publish_bytes(self.path, hashlib.sha256(body).digest() + body)
        except OSError as error:
            warnings.warn(f"{self.path}: no checkpoint was written ({error}); training goes on", stacklevel=2)
        now = time.monotonic()
        self._due = now + (now - started) / SHARE

    def remove(self) -> None:
        """Removes it with what killed writers left, and the folder where no other training needs it."""
        self.path.unlink(missing_ok=True)
        tidy(self.path.parent)


def tidy(folder: Path) -> None:
    """Removes what killed writers left in a folder of work under way, and the folder where no other needs it."""
    with suppress(OSError):  # Not there, or not empty.
        remove_leftovers(folder)
        folder.rmdir()
