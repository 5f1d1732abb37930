"""What was set aside, as people read it; apart from what sets aside, so that listing it loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# An image with one trouble in one stage is one row, however many methods met it.
SAME = ("image_id", "path", "stage", "error", "message")


def merged_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``quarantine`` with the list ``methods`` of those that failed on an image in the same way."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        kept = merged.setdefault(tuple(row[name] for name in SAME), {**row, "methods": []})
        kept["methods"] += [row["method"]] if row["method"] else []
    return list(merged.values())
