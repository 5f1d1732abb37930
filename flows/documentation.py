"""``python -m flows.documentation FILE... [--check] [--only NAME]``: writes generated blocks of Markdown.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the text around it is written by hand.
With ``--check`` nothing is written and a stale block is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flows.catalogue import default_of, needs_of
from tasks.metric_families import Family, by_family, interval
from xai_core.registry import Entry, MethodEntry, MetricEntry, Need, methods, metrics

BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Rewrites the blocks of the files named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.documentation", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block is stale")
    parser.add_argument("--only", choices=sorted(BLOCKS), help="just the blocks of this name")
    given = parser.parse_args(arguments)
    stale = [path for path in given.files if _refresh(path, given.only, write=not given.check)]
    for path in stale:
        print(f"{path}: {'stale; run make docs' if given.check else 'written'}")
    return int(bool(stale) and given.check)


def _refresh(path: Path, only: str | None, *, write: bool) -> bool:
    """Whether the file's blocks differ from what is generated now."""
    before = path.read_text()
    after = with_blocks(before, only)
    if write and after != before:
        path.write_text(after)
    return after != before


def with_blocks(text: str, only: str | None = None) -> str:
    """The text with its generated blocks made anew (all, or those of one name)."""

    def made(match: re.Match[str]) -> str:
        if only not in (None, match["name"]):
            return match[0]
        return f"{match[1]}\n{BLOCKS[match['name']]()}\n\n{match[3]}"

    return BLOCK.sub(made, text)


def methods_table() -> str:
    """The registered methods: what they are and where they are defined."""
    rows = [
        (f"`{entry.name}`", entry.output, _families(entry), _source(entry), entry.cost, _conduct(entry))
        for entry in methods
    ]
    return _table(("id", "gives", "fits", "source", "cost an image", "passes"), rows)


def options_table() -> str:
    """Every option of every method with its default."""
    return _options(("method", "option", "default"), methods)


def _options(head: tuple[str, ...], entries: Iterable[Entry]) -> str:
    rows = [
        (f"`{entry.name}`", f"`{option.name}`", f"`{default_of(option)}`")
        for entry in entries
        for option in dataclasses.fields(entry.options)
    ]
    return _table(head, rows)


def metrics_tables() -> str:
    """The registered metrics family by family: a table of facts, and the definitions below it."""
    return "\n\n".join(
        _family(family, entries) for family, entries in by_family(metrics, lambda entry: entry.name)
    )


def _family(family: Family, entries: Sequence[MetricEntry]) -> str:
    head = ("id", "better", "bounds", "unit", "needs", "cost an image", "source")
    table = _table(head, [_metric(entry) for entry in entries])
    definitions = "\n".join(f"- **`{entry.name}`**: {_definition(entry)}" for entry in entries)
    return f"### {family.title}\n\n{family.question}\n\n{table}\n\n{definitions}"


def _definition(entry: MetricEntry) -> str:
    sentences = [text[:1].upper() + text[1:] for text in (entry.definition, entry.undefined) if text]
    return _text(". ".join(sentences)) + "."


def _metric(entry: MetricEntry) -> tuple[str, ...]:
    better = "higher" if entry.higher_is_better else "lower"
    needs = ", ".join(NEEDS[need] for need in entry.needs)
    return (f"`{entry.name}`", better, interval(entry.bounds), entry.unit, needs, entry.cost, _text(entry.paper))


def metric_options_table() -> str:
    """Every option of every metric with its default."""
    return _options(("metric", "option", "default"), metrics)


def needs_table() -> str:
    """What methods need of a model beside its family."""
    rows = [(f"`{entry.name}`", "; ".join(needs_of(entry))) for entry in methods if entry.needs]
    return _table(("method", "needs"), rows)


def coverage_table() -> str:
    """Every method on every kind of network: a map, or the number of the refusal below the table."""
    from xai_core.coverage import NETWORKS, coverage

    found = {(one.method, one.network): one.refusal for one in coverage()}
    reasons: dict[str, int] = {}
    for reason in found.values():
        if reason is not None:
            reasons.setdefault(reason, len(reasons) + 1)
    rows = [
        (f"`{entry.name}`", *(_cell(found[entry.name, network], reasons) for network in NETWORKS))
        for entry in methods
    ]
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{_table(('method', *NETWORKS), rows)}\n\nRefusals:\n\n{notes}"


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "options": options_table,
    "needs": needs_table,
    "coverage": coverage_table,
    "metrics": metrics_tables,
    "metric_options": metric_options_table,
}

#: What a metric reads beside the map, in words.
NEEDS: dict[Need, str] = {
    "parts": "parts",
    "mask": "masks or boxes of objects",
    "effects": "true effects of parts (demo)",
    "explainer": "the method again",
}


def _cell(refusal: str | None, reasons: dict[str, int]) -> str:
    return "yes" if refusal is None else f"({reasons[refusal]})"


def _families(entry: MethodEntry) -> str:
    return ", ".join({"cnn": "CNN", "vit": "ViT"}[family] for family in entry.families)


def _source(entry: MethodEntry) -> str:
    return entry.paper + (f", eq. {entry.equation}" if re.match(r"[\dA-Z(]", entry.equation) else "")


def _conduct(entry: MethodEntry) -> str:
    facts = [
        "forwards only" if entry.gradient_free else "gradients",
        *(["explicit attention"] if entry.fused_attention == "off" else []),
        *(["fitted to the data first"] if entry.fit else []),
        *([] if entry.class_specific else ["same map for every class"]),
        *([] if entry.half_precision else ["no bf16"]),
    ]
    return ", ".join(facts)


def _text(text: str) -> str:
    """Prose in which no sign is read as Markdown."""
    return text.replace("*", "\\*").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
