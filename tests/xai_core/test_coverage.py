"""Every method on every kind of network: a finite map or a refusal, as docs/methods.md says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xai_core.coverage import NETWORKS, try_method
from xai_core.registry import methods

# Every network in full; else one of each kind.
SHORT = ("resnet18", "convnext_tiny", "deit_tiny")
TRIED = tuple(NETWORKS) if os.environ.get("VITRINE_COVERAGE") else SHORT
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def documented() -> dict[str, dict[str, bool]]:
    """Network to method to whether the table in the docs says that it is explained."""
    block = PAGE.read_text().split("<!-- generated: coverage -->")[1].split("<!-- end -->")[0]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("|")]
    (_, *networks), _, *rows = lines
    return {
        network: {row[0].strip("`"): row[column] == "yes" for row in rows}
        for column, network in enumerate(networks, start=1)
    }


def test_the_table_has_a_column_for_every_network_and_a_row_for_every_method() -> None:
    table = documented()
    assert list(table) == list(NETWORKS)
    assert all(set(rows) == set(methods.names()) for rows in table.values())


@pytest.mark.parametrize("network", TRIED)
def test_methods_explain_a_network_or_say_why_not(network: str) -> None:
    model = NETWORKS[network].build()
    tried = [try_method(entry, network, model) for entry in methods]
    assert {one.method: one.refusal is None for one in tried} == documented()[network]
    assert all(one.refusal is None or len(one.refusal) > 10 for one in tried)
