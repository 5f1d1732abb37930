"""``vitrine train``: weights for the models that studies explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.config import PathKeys, load_as
from tasks.train_classifier import ClassifierTraining, run_training
from tasks.worker import resolve_device
from xai_core.errors import UsageError

# Paths in a file are relative to the file.
PATH_KEYS: PathKeys = (
    ("dataset", "path"),
    ("dataset", "classes"),
    ("test", "path"),
    ("test", "classes"),
    ("model", "checkpoint"),
)


def train_classifier(config: Path, overrides: list[str], output: Path, device: str) -> None:
    """Trains the classifier of a config, and prints where its weights are and how often it is right."""
    if output.suffix != ".safetensors":
        raise UsageError(f"--output: expected a file named .safetensors, got {output.name!r}")
    chosen = load_as(ClassifierTraining, config, overrides, PATH_KEYS)
    found = _with_bars(lambda tell: run_training(chosen, output, resolve_device(device), tell))
    if found.test_accuracy is not None:
        print(f"accuracy on the test pictures: {found.test_accuracy:.2%}")
    print(f"weights  {found.path}")


def _with_bars(work: Any) -> Any:
    """Runs work that tells how far it is, with a bar for each of its stages."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}")) as bars:
        known: dict[str, Any] = {}

        def tell(stage: str, done: int, of: int, remark: str) -> None:
            if stage not in known or done < bars.tasks[known[stage]].completed:
                known[stage] = bars.add_task(stage, total=of, remark="")
            bars.update(known[stage], completed=done, remark=remark)

        return work(tell)
