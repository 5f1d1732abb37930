"""report: one self-contained HTML page about a run."""

from __future__ import annotations

import json
from typing import Any

import yaml
from markupsafe import Markup

from storage.commits import KEY_CHARACTERS
from tasks.pages import template
from tasks.report import data
from tasks.report.concept_data import concepts_of_run
from tasks.report.curves import mean_curves
from tasks.report.data import Committed
from tasks.report.figures import MOST_BANDS, curve_charts, in_groups, legend
from tasks.report.gallery import gallery
from tasks.report.importance import importance_of_run
from tasks.report.leaderboard import board_of
from tasks.report.queries import questions
from tasks.report.training import training_of_run
from tasks.report.truth import read_truth_table
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study


def run(context: Context) -> Outcome:
    """The file ``report`` of a run; it loads nothing, and the same store gives the same bytes."""
    # It tells how long things took.
    context.commit.file("report", ".html", render(context).encode(), repeatable=False)
    return Outcome(0, 0)


def render(context: Context) -> str:
    """The page as HTML."""
    committed = Committed(context)
    entries = legend([choice.id for choice in context.config.methods])
    charts = curve_charts(mean_curves(committed.results), entries)
    cards, unreadable = gallery(context, committed.results)
    set_aside, set_aside_rows, set_aside_images = data.quarantined(committed)
    timings = data.timings(committed)
    concepts = concepts_of_run(context, committed.results)
    training = training_of_run(committed.results, context.config.training)
    importance = importance_of_run(context, committed.results)
    figures = [json.loads(chart.json) for chart in charts]
    for section in (training, importance, concepts):
        figures += section.figures if section else []
    return template("report.html.j2").render(
        config=context.config,
        config_text=yaml.safe_dump(context.config.identity(), sort_keys=False, allow_unicode=True),
        dataset=_dataset_name(context),
        run_id=context.work.facts["run_id"],
        run=committed.run,
        counts=data.image_counts(committed),
        board=board_of(committed.results, [entry.method for entry in entries]),
        truth=read_truth_table(committed.results, [choice.id for choice in context.config.metrics]),
        legend=entries,
        most_bands=MOST_BANDS,
        charts=in_groups(charts),
        training=training,
        importance=importance,
        # In the order in which they stand on the page.
        figures=_script_json(figures),
        plotly=_plotly() if figures else "",
        cards=cards,
        unreadable=unreadable,
        concepts=concepts,
        timings=timings,
        seconds=sum(row.seconds for row in timings),
        keys=data.keys(committed),
        report_key=context.work.key[:KEY_CHARACTERS],
        quarantine=set_aside,
        quarantine_rows=set_aside_rows,
        quarantine_images=set_aside_images,
        questions=questions(context.config, context.work.facts["run_id"]),
        methods=data.method_facts(committed),
        metrics=data.metric_facts(committed),
    )


def _dataset_name(context: Context) -> str:
    dataset = context.config.dataset
    return f"{dataset.kind} {dataset.path}" if dataset.path else f"the demo's own pictures, seed {dataset.seed}"


def _script_json(document: Any) -> Markup:
    """JSON that is safe inside a script element: no tag can begin or end in it."""
    text = json.dumps(document, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _plotly() -> Markup:
    """The charting library, whole, so that the page needs no network."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


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
    version=6,
    run=run,
    reads=lambda study, variant: {"run_id": study.run_id},
    upstream=everything,
    sharded=False,
    reads_model=False,
    summary="one page about the run",
)
