"""Questions that a report gives to be asked on: SQL of what its sections show."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.config import StudyConfig


@dataclass(frozen=True)
class Question:
    """What is asked, in words and in SQL."""

    words: str
    sql: str


OF_MODEL = (
    Question(
        "The leaderboard, with the count of values behind each mean",
        "select method, metric, avg(value) as mean, count(value) as n, count(*) - count(value) as nulls\n"
        "  from metrics where run_id = '{run_id}' group by all order by metric, mean desc",
    ),
    Question(
        "The surest mistakes of the model",
        "select i.path, i.label_name, p.class_name, p.prob\n"
        "  from images i join predictions p using (run_id, image_id)\n"
        "  where run_id = '{run_id}' and p.rank = 1 and not i.correct order by p.prob desc limit 20",
    ),
)
OF_TRAINING = (
    Question(
        "How the training went, epoch by epoch",
        "select name, split, epoch, value from training where run_id = '{run_id}' order by all",
    ),
)
OF_IMPORTANCE = (
    Question(
        "How right each network is on the patches that are left, and how many are not",
        "select network, direction, threshold, avg(correct::int) as accuracy, avg(masked) as hidden\n"
        "  from importance_accuracy where run_id = '{run_id}' group by all order by all",
    ),
    Question(
        "The pictures on which a network's importance depends least on what they show",
        "select i.path, s.network, s.value\n"
        "  from importance_scores s join images i using (run_id, image_id)\n"
        "  where run_id = '{run_id}' and s.metric = 'blank_correlation' order by s.value desc limit 20",
    ),
)


def questions(config: StudyConfig, run_id: str) -> tuple[Question, ...]:
    """Those of every section that the report of a study has, about one run."""
    asked = (
        (config.asks_model, OF_MODEL),
        (config.training is not None, OF_TRAINING),
        (config.importance is not None, OF_IMPORTANCE),
    )
    return tuple(
        Question(one.words, one.sql.format(run_id=run_id)) for shown, found in asked if shown for one in found
    )
