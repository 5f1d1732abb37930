"""Progress of stages: bars on a terminal, plain lines elsewhere, artifacts in Prefect's UI."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tasks.execute import Receipt
from tasks.stage_task import Progress
from tasks.training.told import Word

LINE_SECONDS = 10.0
# Characters of a bar in a line of a log.
BAR = 24
ARTIFACT_SECONDS = 3.0
WAITING = "waiting"


class BarProgress:
    """One rich bar a stage, with rate and time left."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>14}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._bars.start()
        self._bar: Any = None
        self._started = 0.0
        self._images = 0
        self._stage = self._remark = ""

    def begin(self, stage: str, units: int, images: int) -> None:
        """A new bar."""
        self._started, self._images, self._remark = time.monotonic(), 0, ""
        self._bar = self._bars.add_task(stage, total=max(units, 1), rate="")
        self._stage = stage

    def advance(self, receipt: Receipt) -> None:
        """Moves the bar by one unit."""
        self._images += receipt.images
        rate = self._images / max(time.monotonic() - self._started, 1e-9)
        self._bars.update(self._bar, advance=1, rate=f"{rate:.1f} images/s" if self._images else "")

    def wait(self, reason: str) -> None:
        """Says in the bar that it waits; the reason stands above it, once."""
        if self._bars.tasks[self._bar].fields["rate"] != WAITING:
            self._bars.console.print(f"waiting: {reason}", highlight=False, soft_wrap=True)
            self._bars.update(self._bar, rate=WAITING)

    def tell(self, stage: str, word: Word, left: float | None) -> None:
        """Moves the bar inside a unit of the stage under way; its remark stands above when it changes."""
        if stage != self._stage:
            return
        if word.remark and word.remark != self._remark:
            self._remark = word.remark
            self._bars.console.print(word.remark, highlight=False, soft_wrap=True)
        self._bars.update(self._bar, total=max(word.of, 1), completed=word.done, rate=word.units)

    def end(self, stage: str, executed: int, reused: int) -> None:
        """Fills the bar; says so when there was nothing to do."""
        self._stage = ""
        units = max(executed, 1)
        self._bars.update(self._bar, total=units, completed=units)
        if not executed:
            self._bars.update(self._bar, rate=f"{reused} done before")

    def close(self) -> None:
        """Leaves the bars as they stand."""
        self._bars.stop()


class LineProgress:
    """A line when a stage begins and ends, and one every ten seconds between."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._started = self._said = 0.0
        self._stage = self._waited = self._remark = ""
        self._units = self._done = self._images = 0

    def begin(self, stage: str, units: int, images: int) -> None:
        """Says what there is to do."""
        self._started = self._said = time.monotonic()
        self._remark = ""
        self._stage, self._units, self._done, self._images = stage, units, 0, 0
        if units:
            self._say(f"{stage}: {units} units" + (f", {images} images" if images else ""))

    def advance(self, receipt: Receipt) -> None:
        """Says how far it is, every ten seconds."""
        self._done += 1
        self._images += receipt.images
        moment = time.monotonic()
        if moment - self._said >= LINE_SECONDS:
            self._said = moment
            elapsed = moment - self._started
            left = elapsed / self._done * (self._units - self._done)
            self._say(
                f"{self._stage}: {self._done}/{self._units}, {self._images / elapsed:.1f} images/s, "
                f"{left:.0f} s left"
            )

    def wait(self, reason: str) -> None:
        """Says what it waits for, every ten seconds."""
        moment = time.monotonic()
        if reason != self._waited or moment - self._said >= LINE_SECONDS:
            self._said, self._waited = moment, reason
            self._say(f"{self._stage}: waiting: {reason}")

    def tell(self, stage: str, word: Word, left: float | None) -> None:
        """Says how far a unit of the stage under way is: whenever its remark changes, and every ten seconds."""
        if stage != self._stage:
            return
        moment = time.monotonic()
        if word.remark != self._remark or moment - self._said >= LINE_SECONDS:
            self._said, self._remark = moment, word.remark
            self._say(line(stage, word, left))

    def end(self, stage: str, executed: int, reused: int) -> None:
        """Says what was run and what had been done before."""
        elapsed, self._stage = time.monotonic() - self._started, ""
        if executed or reused:
            self._say(f"{stage}: {executed} run, {reused} done before, {elapsed:.1f} s")

    def close(self) -> None:
        """Nothing to put away."""

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class NoProgress:
    """Says nothing: there is nothing to do."""

    def begin(self, stage: str, units: int, images: int) -> None:
        """Nothing."""

    def advance(self, receipt: Receipt) -> None:
        """Nothing."""

    def wait(self, reason: str) -> None:
        """Nothing."""

    def end(self, stage: str, executed: int, reused: int) -> None:
        """Nothing."""


class ArtifactProgress:
    """A progress artifact per stage in Prefect; a trouble there never stops the run, truth is in the store."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._artifact: Any = None
        self._units = self._done = 0
        self._said = 0.0

    def begin(self, stage: str, units: int, images: int) -> None:
        """A new artifact."""
        from prefect.artifacts import create_progress_artifact

        self._units, self._done, self._said = units, 0, time.monotonic()
        description = f"{self._run_id}: {stage}, {units} units, {images} images"
        self._artifact = create_progress_artifact(
            progress=0.0, key=stage.replace("_", "-"), description=description
        )

    def advance(self, receipt: Receipt) -> None:
        """Moves the artifact, every few seconds."""
        self._done += 1
        if time.monotonic() - self._said >= ARTIFACT_SECONDS:
            self._said = time.monotonic()
            self._update(100 * self._done / self._units)

    def wait(self, reason: str) -> None:
        """The artifact stays where it is."""

    def end(self, stage: str, executed: int, reused: int) -> None:
        """The stage is complete."""
        self._update(100.0)

    def close(self) -> None:
        """Nothing to put away."""

    def _update(self, percent: float) -> None:
        from prefect.artifacts import update_progress_artifact

        update_progress_artifact(self._artifact, progress=percent)


class Several:
    """Tells several listeners."""

    def __init__(self, listeners: Sequence[Progress]) -> None:
        self._listeners = listeners

    def begin(self, stage: str, units: int, images: int) -> None:
        """Passes on."""
        for one in self._listeners:
            one.begin(stage, units, images)

    def advance(self, receipt: Receipt) -> None:
        """Passes on."""
        for one in self._listeners:
            one.advance(receipt)

    def wait(self, reason: str) -> None:
        """Passes on."""
        for one in self._listeners:
            one.wait(reason)

    def end(self, stage: str, executed: int, reused: int) -> None:
        """Passes on."""
        for one in self._listeners:
            one.end(stage, executed, reused)


def line(stage: str, word: Word, left: float | None) -> str:
    """A word as a line with a bar; ``left``: seconds, None where nobody knows yet."""
    full = round(BAR * word.done / max(word.of, 1))
    bar = "█" * full + "░" * (BAR - full)
    remark = f"  {word.remark}" if word.remark else ""
    seconds = "" if left is None else f"  {left:.0f} s left"
    return f"{stage}: {bar} {word.done}/{word.of} {word.units}{remark}{seconds}"


def console_progress() -> BarProgress | LineProgress:
    """Bars where a person watches, lines in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal else LineProgress()
