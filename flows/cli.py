"""The command line: parses what was asked for, and turns errors into exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows import commands, diagnose_command, maintenance, quarantine_command, sql_command, train_command
from flows.pipes import silence_output
from xai_core.training.kinds import Group

app = typer.Typer(
    name="vitrine",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Explains vision classifiers at dataset scale: one config in, a leaderboard of methods and metrics out.",
)

train = typer.Typer(no_args_is_help=True, help="Train models of your own, and explainers.")
app.add_typer(train, name="train")

Config = Annotated[Path | None, typer.Argument(help="A study's YAML; without one, the built-in demo.")]
Store = Annotated[Path, typer.Option("--store", help="Folder that holds results.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a config key (repeatable)."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Take only the first N images.")]
Run = Annotated[str | None, typer.Option("--run", help="A run's id; by default the one updated last.")]
DEFAULT_STORE = Path("vitrine-store")


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    metrics = "metrics"
    parts = "parts"
    extractors = "extractors"
    attributors = "attributors"
    attributions = "attributions"
    models = "models"


class Device(StrEnum):
    """Where something is computed."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ListFormat(StrEnum):
    """How a list is printed."""

    table = "table"
    json = "json"


class RowFormat(StrEnum):
    """How rows are printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@contextmanager
def exit_codes(*, resumable: bool = False) -> Iterator[None]:
    """Turns errors into exit codes: 2 for a request to mend, 1 for a failure, with the command that resumes."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence_output()
        if resumable:
            print("stopped: nobody reads its output; what was committed is kept", file=sys.stderr)
            _print_resume(resumable)
            raise typer.Exit(1) from None
    except commands.USAGE_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was committed is kept", file=sys.stderr)
        _print_resume(resumable)
        raise typer.Exit(1) from None
    except commands.RUN_ERRORS as error:
        print(f"failed: {error}", file=sys.stderr)
        _print_resume(resumable)
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception:
        traceback.print_exc()
        print("failed: the error above is a defect of vitrine; please report it", file=sys.stderr)
        _print_resume(resumable)
        raise typer.Exit(1) from None


def _print_resume(resumable: bool) -> None:
    if resumable:
        print(f"resume with: {commands.resume_command()}", file=sys.stderr)


@app.command(
    epilog="Examples:  vitrine run  |  vitrine run configs/imagenet-sample.yaml --limit 64  |  "
    "vitrine run my.yaml --set 'methods=\\[grad_cam]' --set run.shard_size=32"
)
def run(
    config: Config = None, store: Store = DEFAULT_STORE, overrides: Overrides = None, limit: Limit = None
) -> None:
    """Run a study, or resume it: what is done is never done again."""
    with exit_codes(resumable=True):
        raise typer.Exit(commands.run(config, store, overrides or [], limit))


@app.command(epilog="Example:  vitrine plan configs/imagenet-sample.yaml --limit 64")
def plan(
    config: Config = None, store: Store = DEFAULT_STORE, overrides: Overrides = None, limit: Limit = None
) -> None:
    """Show what would run and why: missing, code, config, upstream or corrupt."""
    with exit_codes():
        commands.plan(config, store, overrides or [], limit)


@app.command(epilog="Example:  vitrine status --store vitrine-store")
def status(store: Store = DEFAULT_STORE) -> None:
    """Show the runs of a store and how far each stage is."""
    with exit_codes():
        commands.status(store)


@app.command(epilog="Example:  vitrine verify --repair && vitrine run")
def verify(
    store: Store = DEFAULT_STORE,
    repair: Annotated[bool, typer.Option("--repair", help="Drop the commits of damaged objects.")] = False,
) -> None:
    """Hash every committed object; --repair makes the next run redo the damaged ones."""
    with exit_codes():
        raise typer.Exit(maintenance.verify(store, repair))


@app.command(epilog="Example:  vitrine delete demo-0d45ffc2af && vitrine gc --delete")
def delete(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `vitrine status` prints it.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Forget a run; what other runs share with it stays whole, the rest is left to `gc`."""
    with exit_codes():
        maintenance.delete(run, store)


@app.command(epilog="Examples:  vitrine gc  |  vitrine gc --delete")
def gc(
    store: Store = DEFAULT_STORE,
    really: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only listed.")] = False,
) -> None:
    """List what no run refers to any more (a dry run); --delete removes it."""
    with exit_codes():
        maintenance.gc(store, really)


@app.command(
    epilog="Examples:  vitrine sql --tables  |  vitrine sql 'from leaderboard'  |  "
    "vitrine sql \"from worst_images where method = 'kl_hessian'\" -o worst.csv"
)
def sql(
    query: Annotated[str | None, typer.Argument(help="One SQL query in DuckDB's dialect.")] = None,
    store: Store = DEFAULT_STORE,
    run: Annotated[
        list[str] | None, typer.Option("--run", help="Only this run (repeatable); by default all.")
    ] = None,
    rows: Annotated[
        RowFormat | None,
        typer.Option(
            "--format",
            help="By default what the suffix of -o says, else table (at most 1000 rows). "
            "JSON has null for NaN and infinities.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to a file instead, whole or not at all.")
    ] = None,
    tables: Annotated[bool, typer.Option("--tables", help="List tables and views, with what they hold.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which the query is stopped.")] = 60.0,
    memory: Annotated[
        str, typer.Option(help="Memory that the query, and once more its result, may take.")
    ] = "1GB",
    threads: Annotated[int, typer.Option(help="Threads that the query may use.")] = 2,
) -> None:
    """Ask a question of the results; a query can neither write nor reach outside the store."""
    with exit_codes():
        sql_command.sql(
            query,
            store,
            format=rows.value if rows else None,
            output=output,
            runs=run or [],
            tables=tables,
            timeout=timeout,
            memory=memory,
            threads=threads,
        )


@app.command(epilog="Example:  vitrine quarantine --format csv -o set-aside.csv")
def quarantine(
    store: Store = DEFAULT_STORE,
    run: Run = None,
    rows: Annotated[RowFormat | None, typer.Option("--format", help="How rows are printed.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to a file instead.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try these again with the next run.")] = False,
) -> None:
    """List the images that a run set aside, with the stage and the reason; --retry lets the next run try again."""
    with exit_codes():
        if retry:
            quarantine_command.retry(store, run)
            return
        quarantine_command.quarantine(store, run, rows.value if rows else None, output)


@app.command(epilog="Example:  vitrine report -o study.html")
def report(
    store: Store = DEFAULT_STORE,
    run: Run = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Copy the page to this file.")] = None,
) -> None:
    """Print where a run's report is, or copy it."""
    with exit_codes():
        commands.report(store, run, output)


@app.command(epilog="Example:  vitrine explain cat.jpg --method grad_cam --method kl_hessian -o cat.png")
def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to explain.")],
    config: Annotated[Path | None, typer.Option("--config", help="Take the model and parts of a study.")] = None,
    model: Annotated[str | None, typer.Option(help="A timm model, with its pretrained weights.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Local .safetensors weights for the model.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="A method (repeatable).")] = None,
    target: Annotated[int | None, typer.Option(help="Class to explain; by default the model's first.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG to write.")] = Path("explanation.png"),
    overrides: Overrides = None,
) -> None:
    """Explain single pictures: writes a PNG and prints the top classes and parts."""
    with exit_codes():
        commands.explain(images, config, model, checkpoint, method or [], target, output, overrides or [])


@app.command(
    epilog="Examples:  vitrine diagnose cat.jpg --classes 'tiger cat,boxer'  |  "
    "vitrine diagnose dog.jpg --classes 232,115 --attack 4 -o dog.html"
)
def diagnose(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    classes: Annotated[str, typer.Option(help="Classes to compare, by number or name, separated by commas.")],
    store: Store = DEFAULT_STORE,
    run: Run = None,
    extractor: Annotated[
        str | None, typer.Option(help="Whose dictionaries to use; by default those of the run's graphs.")
    ] = None,
    attack: Annotated[
        float | None,
        typer.Option(min=0.0, help="Also compare with the picture after an FGSM attack of so many 255ths."),
    ] = None,
    towards: Annotated[
        str | None, typer.Option(help="The class that the attack wants; by default the last of --classes.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML page to write.")] = Path("diagnosis.html"),
) -> None:
    """Show through which concepts classes compete for a picture, by the dictionaries of a run."""
    with exit_codes():
        diagnose_command.diagnose_picture(image, classes, store, run, extractor, attack, towards, output)


@app.command("list", epilog="Example:  vitrine list methods --format json")
def list_things(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    pattern: Annotated[str | None, typer.Argument(help="Only names that match, such as 'vit_*'.")] = None,
    rows: Annotated[ListFormat, typer.Option("--format", help="How the list is printed.")] = ListFormat.table,
) -> None:
    """List what a config can name: methods, metrics, parts, extractors, attributors, attributions, models."""
    with exit_codes():
        commands.list_things(kind.value, pattern, rows.value)


TrainConfig = Annotated[Path, typer.Argument(help="YAML: dataset, model and training.")]
Weights = Annotated[Path, typer.Option("-o", "--output", help="File of the weights, a copy of the store's.")]
TrainDevice = Annotated[Device | None, typer.Option(help="Where to train; by default the config's run.device.")]


@train.command(
    "classifier",
    epilog="Example:  vitrine train classifier configs/training/cifar10-resnet.yaml -o resnet.safetensors",
)
def train_classifier(
    config: TrainConfig,
    output: Weights = Path("classifier.safetensors"),
    store: Store = DEFAULT_STORE,
    device: TrainDevice = None,
    overrides: Overrides = None,
) -> None:
    """Train a timm classifier on a data set; the weights are what `model.checkpoint` names in a study."""
    _train("classifier", config, output, store, device, overrides)


@train.command(
    "explainer",
    epilog="Example:  vitrine train explainer configs/training/aha-demo.yaml -o aha.safetensors",
)
def train_explainer(
    config: TrainConfig,
    output: Weights = Path("explainer.safetensors"),
    store: Store = DEFAULT_STORE,
    device: TrainDevice = None,
    overrides: Overrides = None,
) -> None:
    """Train an explainer of a model; the file is the `checkpoint` of the method that the command prints."""
    _train("explainer", config, output, store, device, overrides)


@train.command(
    "importance",
    epilog="Example:  vitrine train importance configs/training/ia-cifar10.yaml -o ia.safetensors",
)
def train_importance(
    config: TrainConfig,
    output: Weights = Path("importance.safetensors"),
    store: Store = DEFAULT_STORE,
    device: TrainDevice = None,
    overrides: Overrides = None,
) -> None:
    """Train a model that explains itself: IA, EA or PA."""
    _train("importance", config, output, store, device, overrides)


def _train(
    group: Group,
    config: Path,
    output: Path,
    store: Path,
    device: Device | None,
    overrides: list[str] | None,
) -> None:
    """One of the trainings; like a study it resumes."""
    chosen = [*(overrides or []), *([f"run.device={device.value}"] if device else [])]
    with exit_codes(resumable=True):
        raise typer.Exit(train_command.train(group, config, chosen, output, store))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("vitrine"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The ``vitrine`` command."""
    app()


if __name__ == "__main__":
    main()
