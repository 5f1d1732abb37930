"""Follows a training while it runs, whichever process or machine it runs on."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from storage.commits import Unit
from storage.store import Store
from tasks.training.stage import STAGE
from tasks.training.told import SECONDS, Word, last_word


class Listener(Protocol):
    """Whoever is told how far a unit is."""

    def tell(self, stage: str, word: Word, left: float | None) -> None:
        """So far a unit of a stage is, be this run at that stage or not; ``left``: seconds, None if unknown."""


class Watch:
    """Tells a listener how far a run's training is while its block lasts."""

    def __init__(self, store: Store, run_id: str, listener: Listener) -> None:
        self._store, self._run_id, self._listener = store, run_id, listener
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        began: tuple[float, Word] | None = None
        while not self._over.wait(SECONDS):
            word, moment = self._word(), time.monotonic()
            if word is None:
                continue
            if began is None or began[1].units != word.units:
                began = moment, word
            self._listener.tell(STAGE.name, word, _left(word, began, moment))

    def _word(self) -> Word | None:
        run = self._store.runs.read(self._run_id)
        key = None if run is None else run.units().get(Unit(STAGE.name))
        return None if key is None else last_word(self._store.root / "work", key)


def _left(word: Word, began: tuple[float, Word], moment: float) -> float | None:
    """Seconds that what is left takes at the pace since the first word of its kind."""
    started, first = began
    done = word.done - first.done
    return (moment - started) / done * (word.of - word.done) if done > 0 else None
