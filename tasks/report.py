"""report: one self-contained HTML page about a run."""

from __future__ import annotations

from tasks.stage import Context, Outcome, Stage
from tasks.study import Study


def run(context: Context) -> Outcome:
    """The file ``report`` of a run."""
    context.commit.file("report", ".html", b"<html></html>")
    return Outcome(0, 0)


def everything(study: Study, variant: str) -> tuple[tuple[str, str], ...]:
    """Every other stage with all its variants."""
    from tasks.pipeline import STAGES

    return tuple(
        (stage.name, other)
        for stage in STAGES.values()
        if stage.name != STAGE.name
        for other in stage.variants(study)
    )


STAGE = Stage(
    name="report",
    version=1,
    run=run,
    reads=lambda study, variant: {"run_id": study.run_id},
    upstream=everything,
    sharded=False,
    reads_model=False,
    summary="one page about the run",
)
