"""The generated blocks of the docs are those that the registries give now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.documentation import BLOCKS, with_blocks

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "methods.md"


@pytest.mark.parametrize("block", sorted(set(BLOCKS) - {"coverage"}))  # that one has a test of its own
def test_the_methods_page_is_up_to_date(block: str) -> None:
    text = PAGE.read_text()
    assert f"<!-- generated: {block} -->" in text
    assert with_blocks(text, block) == text, "stale: run make docs"


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
