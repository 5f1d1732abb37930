"""The stages in the order in which a study runs them."""

from __future__ import annotations

from dataclasses import replace

from tasks import (
    attribute,
    cafe,
    concept_fit,
    concept_graph,
    dictionary,
    exemplars,
    manifest,
    metrics,
    parts,
    pfv,
    predict,
    truth,
)
from tasks.importance import seeds
from tasks.importance import stage as importance_stage
from tasks.report import stage as report_stage
from tasks.stage import Stage
from tasks.study import Study
from tasks.training import final_test
from tasks.training import stage as training_stage


def _where_asked(stage: Stage) -> Stage:
    """A stage that a study leaves out where nobody asks what its model says of the images."""

    def variants(study: Study) -> tuple[str, ...]:
        return stage.variants(study) if study.config.asks_model else ()

    return replace(stage, variants=variants)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        manifest.STAGE,
        training_stage.STAGE,
        final_test.STAGE,
        _where_asked(predict.STAGE),
        _where_asked(parts.STAGE),
        truth.STAGE,
        pfv.STAGE,
        dictionary.STAGE,
        exemplars.STAGE,
        concept_graph.STAGE,
        cafe.STAGE,
        concept_fit.STAGE,
        attribute.STAGE,
        metrics.STAGE,
        importance_stage.STAGE,
        seeds.STAGE,
        report_stage.STAGE,
    )
}
