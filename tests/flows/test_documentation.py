"""The generated blocks of the docs are those that the registries give now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from flows.documentation import BLOCKS, NEEDS, with_blocks
from tasks.metric_families import FAMILIES, family_of
from xai_core.registry import Need, metrics

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = {
    "methods.md": ("methods", "options", "needs", "coverage"),
    "metrics.md": ("metrics", "metric_options"),
}
QUICK = [(page, block) for page, blocks in PAGES.items() for block in blocks if block != "coverage"]


@pytest.mark.parametrize(("page", "block"), QUICK)  # coverage has a test of its own
def test_a_page_is_up_to_date(page: str, block: str) -> None:
    text = (DOCS / page).read_text()
    assert f"<!-- generated: {block} -->" in text
    assert with_blocks(text, block) == text, "stale: run make docs"


def test_every_block_stands_on_a_page_that_make_docs_writes() -> None:
    assert sorted(block for blocks in PAGES.values() for block in blocks) == sorted(BLOCKS)
    recipe = (REPOSITORY / "Makefile").read_text().split("\ndocs:")[1].splitlines()[1]
    assert all(f"docs/{page}" in recipe.split() for page in PAGES)


def test_the_metrics_page_tells_every_metric_with_its_definition() -> None:
    text = (DOCS / "metrics.md").read_text()
    assert all(f"| `{entry.name}` |" in text and f"- **`{entry.name}`**: " in text for entry in metrics)
    assert "∞" in text and "None" not in text.split("## Options")[0]


def test_every_metric_is_of_a_family_and_of_needs_that_have_words() -> None:
    assert {entry.name: family_of(entry.name) for entry in metrics if entry.family not in FAMILIES} == {}
    assert set(get_args(Need)) == set(NEEDS)


def test_a_stale_block_is_named_and_then_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: needs -->\nold\n<!-- end -->\nafter\n")

    def documentation(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.documentation", str(page), *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    checked = documentation("--check")
    assert checked.returncode == 1
    assert "stale; run make docs" in checked.stdout
    assert "old" in page.read_text()
    assert documentation().returncode == 0
    assert documentation("--check").returncode == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- generated: needs -->\n\n| method | needs |")
    assert text.endswith("<!-- end -->\nafter\n")
