"""importance_seeds: how far the importance of an image varies with the seed of the training (equation 3)."""

from __future__ import annotations

import numpy as np
import torch

from storage.commits import Unit
from tasks.importance.networks import SeedSet
from tasks.importance.stage import SCORES, score_rows
from tasks.importance.stage import STAGE as IMPORTANCE
from tasks.stage import Context, Outcome, Stage
from tasks.study import Study
from xai_core.inherent.reproducibility import deviations

#: The metric under which the stage's values stand.
REPRODUCIBILITY = "reproducibility"


def run(context: Context) -> Outcome:
    """Rows of ``importance_scores`` of one set: the images to which all of its networks gave an importance."""
    name = context.work.unit.variant
    members = _members(context)
    records = [context.record(unit.stage, unit.variant) for unit in members]
    valid = np.all([context.store.read_array(record, "valid") for record in records], axis=0)
    rows = np.flatnonzero(valid)
    runs = [torch.from_numpy(context.store.read_array(record, "importance")[rows]) for record in records]
    values = {REPRODUCIBILITY: deviations(runs) if len(rows) else torch.zeros(0)}
    told = score_rows(name, context.work.start + rows, values, {REPRODUCIBILITY: [None] * len(rows)})
    context.commit.table(SCORES, told)
    facts = {
        "members": [unit.variant for unit in members],
        "seeds": [record.facts["seed"] for record in records],
    }
    return Outcome(len(rows), len(rows), facts=facts)


def _members(context: Context) -> list[Unit]:
    """The units of the set's networks, in the set's order."""
    return [unit for unit in context.work.upstream if unit.stage == IMPORTANCE.name]


def _named(study: Study, variant: str) -> SeedSet:
    return next(one for one in study.seed_sets if one.id == variant)


STAGE = Stage(
    name="importance_seeds",
    version=1,
    run=run,
    reads=lambda study, variant: {"networks": [network.digest for network in _named(study, variant).members]},
    upstream=lambda study, variant: tuple((IMPORTANCE.name, one.id) for one in _named(study, variant).members),
    variants=lambda study: tuple(one.id for one in study.seed_sets),
    reads_model=False,
    summary="how far importance varies with the seed of the training",
)
