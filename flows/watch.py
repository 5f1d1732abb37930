"""Lines about a training while it runs, whichever process or machine it runs on."""

from __future__ import annotations

import sys
import threading
import time

from flows.progress import LINE_SECONDS
from storage.commits import Unit
from storage.store import Store
from tasks.training.stage import STAGE
from tasks.training.told import SECONDS, Word, last_word

BAR = 24


class Watch:
    """Says how far a run's training is while its block lasts: at every epoch, and every ten seconds.

    It is printed where warnings are: bars that stand there move out of its way.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        said: tuple[float, Word] | None = None
        began: tuple[float, Word] | None = None
        while not self._over.wait(SECONDS):
            word, moment = self._word(), time.monotonic()
            if word is None:
                continue
            if began is None or began[1].units != word.units:
                began = moment, word
            if said is None or word.remark != said[1].remark or moment - said[0] >= LINE_SECONDS:
                said = moment, word
                print(line(word, _left(word, began, moment)), file=sys.stderr, flush=True)

    def _word(self) -> Word | None:
        run = self._store.runs.read(self._run_id)
        key = None if run is None else run.units().get(Unit(STAGE.name))
        return None if key is None else last_word(self._store.root / "work", key)


def line(word: Word, left: float | None) -> str:
    """A word as a line with a bar; ``left``: seconds, None where nobody knows yet."""
    full = round(BAR * word.done / max(word.of, 1))
    bar = "█" * full + "░" * (BAR - full)
    remark = f"  {word.remark}" if word.remark else ""
    seconds = "" if left is None else f"  {left:.0f} s left"
    return f"{STAGE.name}: {bar} {word.done}/{word.of} {word.units}{remark}{seconds}"


def _left(word: Word, began: tuple[float, Word], moment: float) -> float | None:
    """Seconds that what is left takes at the pace since the first word of its kind."""
    started, first = began
    done = word.done - first.done
    return (moment - started) / done * (word.of - word.done) if done > 0 else None
