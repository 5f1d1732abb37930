"""The stages in the order in which a study runs them."""

from __future__ import annotations

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
from tasks.report import stage as report_stage
from tasks.stage import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (
        manifest,
        predict,
        parts,
        truth,
        pfv,
        dictionary,
        exemplars,
        concept_graph,
        cafe,
        concept_fit,
        attribute,
        metrics,
        report_stage,
    )
}
