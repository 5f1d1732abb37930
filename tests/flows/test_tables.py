"""The leaderboard in the terminal: readable for few and for many methods and metrics."""

from __future__ import annotations

import io

from rich.console import Console

from flows.tables import leaderboard_table
from tasks.leaderboard import Standing

MANY = ("insertion", "deletion[steps=20]", "aopc", "srg", "gini", "entropy", "iou", "recall", "precision")


def printed(methods: int, metrics: tuple[str, ...]) -> list[str]:
    """The table's lines; method ``m0`` has the best mean of all that is the better the higher."""
    rows = [
        Standing(f"m{index}[a=1]", metric, 1 - index / 100, None, None, 7, 0, metric[0] not in "de")
        for index in range(methods)
        for metric in metrics
    ]
    console = Console(file=io.StringIO(), width=150)
    console.print(leaderboard_table(rows))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_few_metrics_stand_side_by_side() -> None:
    lines = printed(3, MANY[:3])
    head = next(line.split() for line in lines if "method" in line)
    assert head == ["method", "insertion", "↑", "deletion[steps=20]", "↓", "aopc", "↑"]
    assert ["m1[a=1]", "0.990", "0.990", "0.990"] in [line.split() for line in lines]


def test_many_metrics_go_down_in_families() -> None:
    rows = [line.split() for line in printed(3, MANY)]
    assert ["metric", "m0[a=1]", "m1[a=1]", "m2[a=1]"] in rows
    assert ["deletion[steps=20]", "↓", "1.000", "0.990", "0.980"] in rows
    order = [rows.index([family]) for family in ("perturbation", "localisation", "complexity")]
    assert order == sorted(order)
    assert rows.index(["iou", "↑", "1.000", "0.990", "0.980"]) > order[1]


def test_of_many_methods_the_best_of_each_metric_are_told() -> None:
    rows = [line.split() for line in printed(9, MANY)]
    assert ["insertion", "↑", "1.000", "7", "m0[a=1]"] in rows
    assert ["entropy", "↓", "0.920", "7", "m8[a=1]"] in rows
    assert not any("m1[a=1]" in row for row in rows)
